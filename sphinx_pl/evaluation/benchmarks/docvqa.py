"""DocVQA and InfographicVQA: questions about pages and infographics (Mathew et al. 2021 and 2022).

Files (https://rrc.cvc.uab.es/?ch=17, tasks 1 and 3), each {"data": [question]}:

- DocVQA: `val_v1.0_withQT.json` (older: `val_v1.0.json`) and `test_v1.0.json` with {"questionId",
  "question", "question_types", "image": "documents/….png", "answers"}. The images' folder holds the
  PNG files, or a folder `documents` with them.
- InfographicVQA: `infographicsVQA_val_v1.0_withQT.json` (or without `_withQT`) and
  `infographicsVQA_test_v1.0.json` with {"questionId", "question", "image_local_name", "answers",
  "answer_type", "evidence", "operation/reasoning"}. The images' folder holds the files of that
  name.

Files of test have no answers. The server takes [{"questionId", "answer"}].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar

from sphinx_pl.data.converters.common import keyed, question_record, text
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks.short_answers import ShortAnswerBenchmark
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.anls import anls


class DocumentBenchmark(ShortAnswerBenchmark):
    """Benchmarks of documents. Parts are the types that the file gives a question, which may have
    several."""

    url = "https://rrc.cvc.uab.es/?ch=17"
    licence = "see the page"
    family = "documents"
    splits = ("val", "test")
    hidden = ("test",)
    server_id = "questionId"
    max_new_tokens = 100
    metric = "anls", "Mean similarity to the nearest true answer: 1 - edit distance / longer length, 0 if below 0.5."
    files: ClassVar[Mapping[str, tuple[str, ...]]]
    """The files of each split, the newest first."""
    types: ClassVar[tuple[str, ...]]
    """The keys of an entry that list its types."""

    @abstractmethod
    def image(self, entry: Any) -> str: ...

    def entries(self) -> Iterator[tuple[str, Any]]:
        yield from keyed(self.json(*self.files[self.split])["data"], "questionId")

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        image, question = self.image(entry), text(entry["question"])
        types = [entry.get(name) or [] for name in self.types]
        meta = {"question_id": entry["questionId"], "types": [text(name) for names in types for name in names]}
        if self.is_hidden:
            yield self.unanswered(Record(key, "short_vqa", (ImageRef(image),), question=question, meta=meta))
        else:
            answers = [text(answer) for answer in entry["answers"]]
            yield question_record(key, image, question, answers[0], meta | {"answers": answers})

    def agreement(self, prediction: str, answers: Sequence[str]) -> float:
        return anls(prediction, answers)

    def category(self, record: Record) -> str:
        return ", ".join(record.meta.get("types", ()))

    def stratum(self, record: Record) -> str:
        """All questions: some types are kinds of answers ("Yes/No", "single span")."""
        return ""

    def groups(self, prediction: Prediction) -> Sequence[str]:
        types: Sequence[str] = prediction.record["meta"].get("types", ())
        return types


class DocVQABenchmark(DocumentBenchmark):
    name = "docvqa"
    title = "DocVQA"
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "val": ("val_v1.0_withQT.json", "val_v1.0.json"),
        "test": ("test_v1.0.json",),
    }
    types = ("question_types",)

    def image(self, entry: Any) -> str:
        path = PurePosixPath(text(entry["image"]))
        return str(path) if (self.images / path.parent).is_dir() else path.name


class InfographicVQABenchmark(DocumentBenchmark):
    name = "infographicvqa"
    title = "InfographicVQA"
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "val": ("infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json"),
        "test": ("infographicsVQA_test_v1.0.json",),
    }
    types = ("answer_type", "evidence", "operation/reasoning")

    def image(self, entry: Any) -> str:
        return text(entry["image_local_name"])
