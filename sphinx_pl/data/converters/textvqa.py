"""TextVQA has questions that are answered by reading text in an image, with ten answers each.

The file (https://textvqa.org/dataset) is `TextVQA_0.5.1_{split}.json` with {"data":
[{"question_id", "image_id", "question", "answers": [ten], ...}]}. The images are those of
train_val_images.zip, which has both splits in train_images/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import keyed, most_frequent, question_record, text
from sphinx_pl.data.schema import Record

# The remarks that annotators wrote instead of an answer.
_REMARKS = (
    "unanswerable",
    "no text in image",
    "not a question",
    "answering does not require reading text in the image",
)


class TextVQAConverter(Converter):
    """The target is the most frequent answer. meta keeps all ten for the official metric."""

    name = "textvqa"
    title = "TextVQA"
    url = "https://textvqa.org/dataset"
    licence = "CC BY 4.0"
    tasks = ("short_vqa", "yes_no")

    def entries(self) -> Iterator[tuple[str, Any]]:
        yield from keyed(self.json(f"TextVQA_0.5.1_{self.split}.json")["data"], "question_id")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        image = f"train_images/{text(entry['image_id'])}.jpg"
        if "answers" not in entry:
            self.skipped["answers_not_public"] += 1
            return
        answer = most_frequent(entry["answers"])
        if answer in _REMARKS:
            self.skipped["answer_is_a_remark"] += 1
            return
        yield question_record(key, image, entry["question"], answer, {"answers": entry["answers"]})
