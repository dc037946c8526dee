"""A benchmark: its official files -> questions, its answers -> their official numbers."""

from __future__ import annotations

import dataclasses
import json
import shlex
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sphinx_pl.data.annotation_files import MALFORMED, AnnotationFiles
from sphinx_pl.data.converters.common import question_record, text
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.readers.instruction_json import to_entry, to_record
from sphinx_pl.data.schema import ImageRef, Record, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.metrics import Metric
from sphinx_pl.evaluation.runner import Prediction, score_answer
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole
from sphinx_pl.utils.registry import Registry

BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark", "conf/benchmark/paper.yaml")
FAMILIES = {
    "mllm": "Benchmarks of multimodal LLMs",
    "vqa": "Visual question answering",
    "documents": "Text, documents and charts",
    "grounding": "Referring expressions",
    "captions": "Captions",
    "tasks": "Detection, pose, layout and OCR",
}
"""The parts of a results page, in their order."""
HIDDEN = "(not public)"
"""The text that stands for an answer that is not public."""


class Benchmark(AnnotationFiles):
    """One benchmark: its questions, its scorer and its metrics.

    A record's `meta` holds what scoring needs, as JSON. It is written beside the answer, so that
    answers can be scored again without the files.

    Args:
        src: the folder of the official files under their official names. Or one file, the
            original's unified annotation: a JSON list of {"image_path", "question", "question_id",
            "gt_answers"}. None: there are no files, and only existing answers are scored.
        split: one of `splits`; None is the first.
        images: the folder that image paths are relative to; by default `src`, or the file's folder.

    Raises:
        UserError: an unknown split, or a folder that does not exist.
    """

    family: ClassVar[str]
    """A key of `FAMILIES`."""
    max_new_tokens: ClassVar[int | None] = None
    """The longest answer, where that is not the task's."""
    hidden: ClassVar[tuple[str, ...]] = ()
    """The splits whose truth is not public: their answers go to a server."""
    official_only: ClassVar[bool] = False
    """Whether `src` must be the official files, since the unified annotation holds too little."""
    closed: ClassVar[tuple[str, ...]] = ()
    """The answers that all questions allow, for `ranking`; () where they are open, or have choices
    of their own.

    The task of a record does not tell, since it depends on the truth: a short answer of yes or no
    has the task yes_no.
    """
    server_id: ClassVar[str] = "question_id"
    """The server's name for a question's id, which is the record's meta["question_id"]."""

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            BENCHMARKS.register(cls.name, cls)

    def __init__(self, src: Path | None, split: str | None = None, images: Path | None = None) -> None:
        if src is None:
            src = images = Path()
        super().__init__(src.parent if src.is_file() else src, split if split is not None else self.splits[0])
        if not src.exists():
            raise UserError(f"{self.name}: '{src}' does not exist: it should hold the files of {self.url}")
        self.unified = src.name if src.is_file() else None
        self.images = images or self.src
        if not self.images.is_dir():
            raise UserError(f"{self.name}: the images' folder '{self.images}' does not exist")

    def check(self) -> None:
        """Check that the tools that scoring needs are installed, before anything is asked.

        Raises:
            UserError: a tool is missing; the message says how to install it.
        """

    @property
    @abstractmethod
    def metrics(self) -> Sequence[Metric]:
        """The official numbers, the main one first; () where the truth is not public."""

    @property
    def category_metrics(self) -> Sequence[Metric]:
        """The numbers that each category also has by itself; by default the main one."""
        return self.metrics[:1]

    @abstractmethod
    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        """The score of an answer's text; never raises."""

    def category(self, record: Record) -> str:
        """The part of the benchmark that a record belongs to, "" where it has no parts."""
        return str(record.meta.get("category", ""))

    def unit(self, record: Record) -> str:
        """A name that questions share which count together, and so are drawn together; by default
        each stands alone."""
        return record.key

    def stratum(self, record: Record) -> str:
        """The part of the benchmark that `limit` draws from: by default the category.

        Where the category follows from the answer it is another part, so that the draw does not
        depend on the truth.
        """
        return self.category(record)

    def groups(self, prediction: Prediction) -> Sequence[str]:
        """The parts of the benchmark whose numbers an answer counts in; by default its category."""
        return (prediction.topic,)

    @property
    def is_hidden(self) -> bool:
        """Whether the split's truth is not public."""
        return self.split in self.hidden

    def unanswered(self, record: Record) -> Record:
        """A record without a public answer, which can still be asked in its task's wording.

        Raises:
            SkipSample: the task cannot write it, or it has no id. yes_no never can; short_vqa has
                the same wording.
        """
        if not isinstance(record.meta.get("question_id"), int | str):
            raise SkipSample("question_id_missing", record.key)
        stand_in = record.choices[0] if record.choices else HIDDEN
        (turn,) = TASKS[record.task].turns(dataclasses.replace(record, answer=stand_in), Coordinates())
        return dataclasses.replace(record, turns=(Turn(turn.question, HIDDEN),))

    def submit(self, predictions: Sequence[Prediction], folder: Path) -> list[str]:
        """Write the files for a server or a judge to `folder`; returns a sentence about each file.

        By default, a split with hidden truth gets a JSON list of {`server_id`, "answer"}, and
        others get nothing.
        """
        if not self.is_hidden:
            return []
        answers = {p.record["meta"]["question_id"]: self.submitted(p.prediction) for p in predictions}
        wanted = self.expected()
        path = folder / f"submission_{self.name}_{self.split}.json"
        rows = [{self.server_id: question, "answer": answers.get(question, "")} for question in wanted]
        write_whole(path, json.dumps(rows, ensure_ascii=False) + "\n")
        blank = sum(question not in answers for question in wanted)
        left = f"; {blank} more questions have a blank answer: they were not asked" if blank else ""
        return [f"{path}: {len(wanted) - blank} answers for the server of {self.title} ({self.url}){left}"]

    def submitted(self, answer: str) -> str:
        """An answer's text as the server gets it."""
        return answer.strip()

    def expected(self) -> Sequence[Any]:
        """The ids of all questions that the server wants an answer to."""
        entries = (records for _, records in self.read() if not isinstance(records, SkipSample))
        return [record.meta["question_id"] for records in entries for record in records]

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        """The record of an entry of the original's unified annotation.

        Raises:
            SkipSample: it cannot be used; any of `MALFORMED` has the same effect.
        """
        image, question = text(entry["image_path"]), text(entry["question"])
        meta = {"question_id": entry.get("question_id")}
        if self.is_hidden:
            return self.unanswered(Record(key, "short_vqa", (ImageRef(image),), question=question, meta=meta))
        truth = entry["gt_answers"]
        answers = [text(answer) for answer in (truth if isinstance(truth, list) else [truth])]
        return question_record(key, image, question, answers[0], meta | {"answers": answers})

    def read(self) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        """As `AnnotationFiles.read`, also for a unified annotation. Records that cannot be asked or
        stored are bad."""
        for key, records in self._read():
            try:
                yield key, records if isinstance(records, SkipSample) else [_checked(record) for record in records]
            except SkipSample as bad:
                yield key, bad

    def _read(self) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        if self.unified is None:
            return super().read()
        if self.official_only:
            raise UserError(f"{self.name}: src={self.src}/{self.unified} must be the folder of the files of {self.url}")
        items = enumerate(self.json_items(self.unified))
        entries = (
            (f"{number}-{entry['question_id']}" if "question_id" in entry else str(number), entry)
            for number, entry in items
        )
        return self.guarded(entries, lambda key, entry: [self.annotation(key, entry)])

    def score_answer(
        self, record: Record, answer: str, coordinates: Coordinates, images: tuple[ImageRef, ...] = ()
    ) -> Prediction:
        """The answer with its score by the benchmark's rule; 0 where the truth is not public."""
        score = Score(0.0) if self.is_hidden else self.score(record, answer, coordinates)
        return dataclasses.replace(
            score_answer(record, answer, coordinates, images),
            benchmark=self.name,
            topic=self.category(record),
            metric=self.metrics[0].name if self.metrics else "",
            score=score.value,
            parsed=score.parsed,
        )


def command(*parts: str | Path) -> str:
    """A command line to run in an official repository, with absolute paths, quoted for a shell."""
    return shlex.join(str(part.resolve()) if isinstance(part, Path) else part for part in parts)


def _checked(record: Record) -> Record:
    """The record, if its task can write it and JSON can hold it.

    Raises:
        SkipSample: the reason why not.
    """
    entry = to_entry(record)
    stored = to_record(entry, record.key, Path(), record.task)
    if record.sizes or not record.regions:  # missing sizes are read from the image when it is asked
        TASKS[record.task].turns(stored, Coordinates())
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except MALFORMED as error:
        raise SkipSample("entry_malformed", f"{record.key}: {type(error).__name__}: {error}") from None
    return record


class JudgedBenchmark(Benchmark):
    """A benchmark whose answers a language model judges: it has no number here.

    `submit` writes the file for the official judge and says how to call it. Nothing here calls it.
    """

    official_only = True

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        return Score(0.0, bool(answer.strip()))

    @property
    def metrics(self) -> Sequence[Metric]:
        return ()
