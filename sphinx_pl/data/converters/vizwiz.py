"""VizWiz-VQA has questions of blind people about photographs that they took.

Each has ten answers, and many questions cannot be answered.

The file (https://vizwiz.org/tasks-and-datasets/vqa) is `{split}.json` of Annotations.zip, a list of
{"image", "question", "answers": [{"answer", "answer_confidence"}], "answer_type", "answerable": 0
or 1}. The images are those of train.zip and val.zip: {split}/{image}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import asked, keyed, most_frequent, text
from sphinx_pl.data.schema import ImageRef, Record

_HINT = "When the provided information is insufficient, respond with 'Unanswerable'."
_NO_ANSWERS = ("unanswerable", "unsuitable", "unsuitable image")


class VizWizConverter(Converter):
    """The target is the most frequent answer, or "Unanswerable".

    All ten answers are kept in meta for the official metric.
    """

    name = "vizwiz"
    title = "VizWiz-VQA"
    url = "https://vizwiz.org/tasks-and-datasets/vqa"
    licence = "see the page"
    tasks = ("short_vqa",)

    def entries(self) -> Iterator[tuple[str, Any]]:
        yield from keyed(self.json(f"{self.split}.json", f"Annotations/{self.split}.json"), "image")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        if "answers" not in entry:
            self.skipped["answers_not_public"] += 1
            return
        answers = [answer["answer"] for answer in entry["answers"]]
        given = [answer for answer in answers if answer.strip().lower() not in _NO_ANSWERS]
        if entry["answerable"] not in (0, 1):
            raise ValueError(f"answerable is {entry['answerable']!r}")
        yield Record(
            key=key,
            task="short_vqa",
            images=(ImageRef(f"{self.split}/{text(entry['image'])}"),),
            question=hinted(entry["question"]),
            answer=most_frequent(given) if entry["answerable"] and given else "Unanswerable",
            meta={"answers": answers, "answerable": entry["answerable"], "answer_type": entry.get("answer_type")},
        )


def hinted(question: Any) -> str:
    """Return a question with the hint that "Unanswerable" is an answer.

    With the words of short_vqa, this is the prompt that the original evaluates with.

    Raises:
        SkipSample: the question is blank.
    """
    return f"{asked(question)} {_HINT}"
