"""VQAv2, OK-VQA, VizWiz and TextVQA: questions that ten people answered, scored by how many of them
agree.

Files: those that the converters of the same names read (`sphinx_pl.data.converters`), and for the
splits without answers

- VQAv2 (https://visualqa.org/download.html): `v2_OpenEnded_mscoco_test-dev2015_questions.json`, a
  part of `v2_OpenEnded_mscoco_test2015_questions.json`, both as those of val. Images are COCO's
  test2015. The server takes [{"question_id", "answer"}] with all test questions, even for the
  numbers of test-dev alone.
- VizWiz (https://vizwiz.org/tasks-and-datasets/vqa): `test.json`, a list of {"image", "question"}.
  Images are those of test.zip. The server takes [{"image", "answer"}].

The original's unified annotations hold only one of the ten answers, so their numbers are not the
official ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from sphinx_pl.data.answer_parsing import normalise
from sphinx_pl.data.converters import id_of, okvqa, textvqa, vizwiz, vqav2
from sphinx_pl.data.converters.common import keyed, most_frequent, question_record, text
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks.short_answers import ShortAnswerBenchmark
from sphinx_pl.evaluation.scorers.vqa import textvqa_accuracy, vqa_accuracy


class VQAAccuracyBenchmark(ShortAnswerBenchmark):
    """Questions with ten people's answers. Case and a full stop at the end do not count.

    Where all ten answers are the same, the official script compares them as they are, so "Yes."
    would be wrong. The servers run that script, so they get answers in lower case without the full
    stop.
    """

    family = "vqa"
    metric = "accuracy", "VQA accuracy: min(people who gave the answer / 3, 1), the mean over leaving one of them out."

    def agreement(self, prediction: str, answers: Sequence[str]) -> float:
        same = len(set(answers)) == 1
        return vqa_accuracy(normalise(prediction), [normalise(answer) for answer in answers] if same else answers)

    def submitted(self, answer: str) -> str:
        return normalise(answer)

    def category(self, record: Record) -> str:
        return str(record.meta.get("answer_type") or "")

    def stratum(self, record: Record) -> str:
        """One part, since the categories are kinds of answers."""
        return ""


class VQAv2Benchmark(VQAAccuracyBenchmark, vqav2.VQAv2Converter):
    """Categories are the answers' types. A submission of test-dev also has blank answers to the
    rest of test, as the server demands, if the files have its questions."""

    name = "vqav2"
    splits = ("val", "test-dev", "test")
    hidden = ("test-dev", "test")

    def entries(self) -> Iterator[tuple[str, Any]]:
        if self.is_hidden:
            yield from keyed(self.json_items(_questions_file(self.split), of="questions"), "question_id")
        else:
            yield from super().entries()

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        if not self.is_hidden:
            yield from super().records(key, entry)
            return
        image = ImageRef(f"test2015/COCO_test2015_{entry['image_id']:012d}.jpg")
        meta = {"question_id": entry["question_id"]}
        yield self.unanswered(Record(key, "short_vqa", (image,), question=text(entry["question"]), meta=meta))

    def expected(self) -> Sequence[Any]:
        if self.unified or self.split == "test" or not (self.src / _questions_file("test")).is_file():
            return super().expected()
        items = self.json_items(_questions_file("test"), of="questions")
        return [number for item in items if (number := id_of(item, "question_id")) is not None]


def _questions_file(split: str) -> str:
    return f"v2_OpenEnded_mscoco_{split}2015_questions.json"


class OKVQABenchmark(VQAAccuracyBenchmark, okvqa.OKVQAConverter):
    """The annotation's stemmed answers are compared, as usual. Categories are the kinds of
    knowledge, by the names that the annotation file gives them."""

    name = "okvqa"
    splits = ("val",)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        for record in super().records(key, entry):
            kind = record.meta["question_type"] or ""
            meta = {"answers": record.meta["answers"], "category": self._kinds.get(kind, kind)}
            yield dataclasses.replace(record, meta=meta)

    def category(self, record: Record) -> str:
        return str(record.meta.get("category", ""))

    def stratum(self, record: Record) -> str:
        return self.category(record)  # of the question

    @cached_property
    def _kinds(self) -> Mapping[str, Any]:
        kinds = self.json(f"mscoco_{self.split}2014_annotations.json").get("question_types")
        return kinds if isinstance(kinds, dict) else {}


class VizWizBenchmark(VQAAccuracyBenchmark, vizwiz.VizWizConverter):
    """The question has the hint to say "Unanswerable", which is an answer like any other.
    Categories are the answers' types.

    The server knows a question by its image's name.
    """

    name = "vizwiz"
    splits = ("val", "test")
    hidden = ("test",)
    server_id = "image"

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        if not self.is_hidden:
            yield from super().records(key, entry)
            return
        name = text(entry["image"])
        image, meta = ImageRef(f"{self.split}/{name}"), {"question_id": name}
        question = vizwiz.hinted(entry["question"])
        yield self.unanswered(Record(key, "short_vqa", (image,), question=question, meta=meta))

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        name = PurePosixPath(entry["image_path"]).name
        return super().annotation(key, {**entry, "question": vizwiz.hinted(entry["question"]), "question_id": name})


class TextVQABenchmark(VQAAccuracyBenchmark, textvqa.TextVQAConverter):
    """All questions are asked, also those with a remark as answer, which training skips."""

    name = "textvqa"
    splits = ("val",)
    max_new_tokens = 32

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        answers = entry["answers"]
        image = f"train_images/{text(entry['image_id'])}.jpg"
        yield question_record(key, image, entry["question"], most_frequent(answers), {"answers": answers})

    def agreement(self, prediction: str, answers: Sequence[str]) -> float:
        return textvqa_accuracy(prediction, answers)
