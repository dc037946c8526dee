"""GQA has compositional questions about Visual Genome's images.

The file (https://cs.stanford.edu/people/dorarad/gqa/download.html; about.html there describes it)
is `{split}_balanced_questions.json`, {question id: {"imageId", "question", "answer", "fullAnswer",
"types": {"structural", "semantic", "detailed"}, ...}}. The images are those of images.zip:
images/{imageId}.jpg.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import question_record, text
from sphinx_pl.data.schema import Record


class GQAConverter(Converter):
    """Each balanced question is a record with its short answer.

    The full sentence is kept in meta.
    """

    name = "gqa"
    title = "GQA"
    url = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
    licence = "see the page"
    tasks = ("short_vqa", "yes_no")
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "testdev")

    def entries(self) -> Iterator[tuple[str, Any]]:
        yield from self.json(f"{self.split}_balanced_questions.json").items()

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        meta = {"full_answer": entry.get("fullAnswer"), "types": entry.get("types")}
        yield question_record(key, f"images/{text(entry['imageId'])}.jpg", entry["question"], entry["answer"], meta)
