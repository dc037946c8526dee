"""SEED-Bench, its part on images: questions with four choices in nine dimensions (Li et al. 2023,
arXiv 2307.16125).

Files (https://huggingface.co/datasets/AILab-CVC/SEED-Bench): `SEED-Bench.json`, {"questions":
[{"question_id", "question", "question_type_id": 1 to 12, "choice_a" to "choice_d", "answer": "A" to
"D", "data_type": "image" or "video", "data_id": the image's name}], "question_type": {name: id}}.
The images are those of `SEED-Bench-image.zip`, whose names have no suffix. Dimensions 10 to 12 are
on videos and are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters.common import text
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks.multiple_choice import MultipleChoiceBenchmark, letter_record

IMAGE_TYPES = range(1, 10)


class SEEDBenchBenchmark(MultipleChoiceBenchmark):
    """The question asks for a letter, as in LLaVA and the original. The official script compares
    the losses of the choices' texts. Categories are the dimensions; the accuracy is over all
    questions, not the mean over dimensions."""

    name = "seed_bench"
    title = "SEED-Bench (images)"
    url = "https://github.com/AILab-CVC/SEED-Bench"
    licence = "CC BY-NC 4.0"
    family = "mllm"
    splits = ("image",)

    def entries(self) -> Iterator[tuple[str, Any]]:
        document = self.json("SEED-Bench.json")
        names = {number: name for name, number in document["question_type"].items()}
        for place, entry in enumerate(document["questions"]):
            is_entry = isinstance(entry, dict)
            if is_entry and entry.get("data_type") == "video":
                self.skipped["video"] += 1
                continue
            yield str(entry.get("question_id", f"#{place}") if is_entry else f"#{place}"), (entry, names)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        question, names = entry
        number = question["question_type_id"]
        if number not in IMAGE_TYPES:
            raise ValueError(f"question type {number} of an image")
        choices = [question[f"choice_{letter}"] for letter in "abcd"]
        meta = {"category": names[number], "question_id": key}
        image = ImageRef(text(question["data_id"]))
        yield letter_record(key, image, text(question["question"]), choices, text(question["answer"]), meta)
