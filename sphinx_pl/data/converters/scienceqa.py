"""ScienceQA has multiple-choice questions from school science. About half of them have an image.

The files (https://github.com/lupantech/ScienceQA, data/scienceqa) are `problems.json`, {id:
{"question", "choices", "answer": index, "hint", "image": "image.png" or null, "split", "lecture",
"solution", "subject", "grade", ...}}, and `pid_splits.json`, {split: [ids]}. The images are those
of train.zip, val.zip and test.zip: {split}/{id}/image.png.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import asked, choice_record, choice_turn, chosen, text
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample

_KEPT = ("subject", "grade", "lecture", "solution")


class ScienceQAConverter(Converter):
    """The hint stands before the question as its context. Lecture and solution are kept in meta.

    A question without an image has the task chat, in the words that multiple_choice uses for an
    image.
    """

    name = "scienceqa"
    title = "ScienceQA"
    url = "https://github.com/lupantech/ScienceQA"
    licence = "CC BY-NC-SA 4.0"
    tasks = ("multiple_choice", "chat")
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test", "trainval", "minitrain", "minival", "minitest")

    def entries(self) -> Iterator[tuple[str, Any]]:
        problems = self.json("problems.json")
        for key in self.json("pid_splits.json")[self.split]:
            yield str(key), problems.get(str(key))

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        if entry is None:
            raise SkipSample("problem_missing", key)
        question, choices, index = asked(entry["question"]), entry["choices"], entry["answer"]
        if hint := text(entry.get("hint") or "").strip():
            question = f"Context: {hint}\n{question}"
        meta = {name: entry[name] for name in _KEPT if entry.get(name)}
        if entry["image"]:
            image = f"{text(entry['split'])}/{key}/{text(entry['image'])}"
            yield choice_record(key, image, question, choices, index, meta)
        else:
            chosen(choices, index)
            yield Record(key=key, task="chat", turns=(choice_turn(question, choices, index),), meta=meta)
