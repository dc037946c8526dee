"""LLaVA-Instruct-150K and LLaVAR have conversations about images, written by a language model.

The files of LLaVA (https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K) are
`llava_instruct_150k.json`, which holds the other three, and `conversation_58k.json`,
`detail_23k.json`, `complex_reasoning_77k.json`. They are lists of {"id", "image", "conversations":
[{"from": "human" or "gpt", "value"}]}. The images are those of COCO's train2017.zip. The mixture of
LLaVA 1.5, llava_v1_5_mix665k.json, needs no converter, because it is an instruction file.

The files of LLaVAR (https://huggingface.co/datasets/SALT-NLP/LLaVAR) have the same form. They are
`llava_instruct_150k_llavar_20k.json` and ..._16k, which hold LLaVA's entries too, and
`chat_llavar.json` for pretraining. The images are those of finetune.zip and pretrain.zip, named
like those of COCO and CC3M.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import conversation_record, keyed
from sphinx_pl.data.schema import Record


class LLaVAInstructConverter(Converter):
    name = "llava_instruct"
    title = "LLaVA-Instruct-150K"
    url = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"
    licence = "CC BY 4.0, and OpenAI's terms of use"
    tasks = ("chat", "detailed_answer")
    splits: ClassVar[tuple[str, ...]] = ("train", "conversation", "detail", "complex_reasoning")
    files: ClassVar[dict[str, str]] = {
        "train": "llava_instruct_150k.json",
        "conversation": "conversation_58k.json",
        "detail": "detail_23k.json",
        "complex_reasoning": "complex_reasoning_77k.json",
    }

    def entries(self) -> Iterator[tuple[str, Any]]:
        # All conversations about an image have its id.
        yield from keyed(self.json(self.files[self.split]), "id", unique=False)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        yield conversation_record(key, entry, "train2017")


class LLaVARConverter(LLaVAInstructConverter):
    """LLaVA's own entries are skipped if they can be told apart.

    Otherwise they would count twice where both data sets are converted.
    """

    name = "llavar"
    title = "LLaVAR"
    url = "https://huggingface.co/datasets/SALT-NLP/LLaVAR"
    licence = "see the page"
    splits = ("train", "train_16k", "pretrain")
    files: ClassVar[dict[str, str]] = {
        "train": "llava_instruct_150k_llavar_20k.json",
        "train_16k": "llava_instruct_150k_llavar_16k.json",
        "pretrain": "chat_llavar.json",
    }

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        record = conversation_record(key, entry)
        if record.images[0].path.startswith("000000"):  # COCO's; LLaVAR's own numbers are longer
            self.skipped["of_llava_instruct"] += 1
        else:
            yield record
