"""OCR-VQA has questions about book covers.

The file (https://ocr-vqa.github.io) is `dataset.json`, {id: {"imageURL", "questions": [...],
"answers": [...], "title", "authorName", "genre", "split": 1 train, 2 validation, 3 test}}. The
script beside it downloads the images to images/{id}{extension of imageURL}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, ClassVar

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import question_record
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample

_NUMBERS = {"train": 1, "val": 2, "test": 3}


class OCRVQAConverter(Converter):
    name = "ocrvqa"
    title = "OCR-VQA"
    url = "https://ocr-vqa.github.io"
    licence = "see the page"
    tasks = ("short_vqa", "yes_no")
    splits: ClassVar[tuple[str, ...]] = tuple(_NUMBERS)

    def entries(self) -> Iterator[tuple[str, Any]]:
        others = [number for split, number in _NUMBERS.items() if split != self.split]
        for key, book in self.json("dataset.json").items():
            if not isinstance(book, dict) or book.get("split") not in others:
                yield key, book

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        if entry["split"] != _NUMBERS[self.split]:
            raise SkipSample("split_unknown", f"{key}: {entry['split']}")
        questions, answers = entry["questions"], entry["answers"]
        if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
            raise SkipSample("answers_count", f"{key}: {questions} but {answers}")
        image = f"images/{key}{PurePosixPath(entry['imageURL']).suffix}"
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            if answer.strip():
                yield question_record(f"{key}-{number}", image, question, answer, {})
            else:  # for example a book without a known author; its other questions are used
                self.skipped["answer_empty"] += 1
