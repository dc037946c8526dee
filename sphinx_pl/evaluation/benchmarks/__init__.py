"""Official benchmarks: their files -> questions, answers -> their official numbers.

One module here for each benchmark or family of them. A `Benchmark` says where its files are, turns their entries into
Records that are asked in the wording of a training task, scores an answer, and sums scores up as its authors do. Where
training data is made of the same files, a benchmark inherits from their `Converter` too, after `Benchmark`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import random
import shlex
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Optional

from sphinx_pl.data.annotation_files import MALFORMED, AnnotationFiles
from sphinx_pl.data.converters.common import question_record, text
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.readers.instruction_json import to_entry, to_record
from sphinx_pl.data.schema import ImageRef, Record, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.measures import Measure, estimate, to_json
from sphinx_pl.evaluation.runner import Prediction, judge
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError, suggest
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
"""Parts of a results page, in their order."""
ROOT = "root"
"""The key of conf/benchmark that is no benchmark but the folder that their files are in."""
HIDDEN = "(not public)"
"""Stands for an answer that is not public."""


@dataclass(frozen=True)
class Verdict:
    """Of one answer: its score in 0..1, and whether it had the form asked for. What has not counts as wrong."""

    score: float
    parsed: bool = True


class Benchmark(AnnotationFiles):
    """One benchmark's questions and how it counts.

    Records carry what scoring needs in `meta`, as JSON: they are written beside the answers and scored anew from there.

    Args:
        src: the folder of the official files under their official names; or one file, the original's unified
            annotation: a JSON list of {"image_path", "question", "question_id", "gt_answers"}. None: there are no
            files, answers are scored that were given before.
        split: one of `splits`; None is the first.
        images: the folder that image paths are relative to; by default `src`, or the file's folder.

    Raises:
        UserError: an unknown split, or a folder that is not there.
    """

    family: ClassVar[str]
    """A key of `FAMILIES`."""
    max_new_tokens: ClassVar[int | None] = None
    """Of an answer, where that is not the task's."""
    hidden: ClassVar[tuple[str, ...]] = ()
    """Those of `splits` whose truth is not public: their answers go to a server."""
    closed: ClassVar[tuple[str, ...]] = ()
    """The answers that all of its questions allow, for `ranking`; () where they are open, or have choices of their own.

    The task of a record must not tell: that of a short answer is yes_no where the truth is yes or no.
    """
    server_id: ClassVar[str] = "question_id"
    """What the server calls a question's id, which is its record's meta["question_id"]."""

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            BENCHMARKS.register(cls.name, cls)

    def __init__(self, src: Path | None, split: str | None = None, images: Path | None = None) -> None:
        if src is None:
            src = images = Path()
        super().__init__(src.parent if src.is_file() else src, split if split is not None else self.splits[0])
        if not src.exists():
            raise UserError(f"{self.name}: '{src}' is not there: it should hold the files of {self.url}")
        self.unified = src.name if src.is_file() else None
        self.images = images or self.src
        if not self.images.is_dir():
            raise UserError(f"{self.name}: the images' folder '{self.images}' is not there")

    def check(self) -> None:
        """What scoring needs is there; called before anything is asked.

        Raises:
            UserError: a tool is missing: which, and how to get it.
        """

    @property
    @abstractmethod
    def measures(self) -> Sequence[Measure]:
        """The official numbers, the main one first; () where the truth is not public."""

    @property
    def category_measures(self) -> Sequence[Measure]:
        """The numbers that each category has by itself as well; by default the main one."""
        return self.measures[:1]

    @abstractmethod
    def verdict(self, record: Record, answer: str, coordinates: Coordinates) -> Verdict:
        """Score an answer's text; never raises."""

    def category(self, record: Record) -> str:
        """The part of the benchmark that a record is of, "" where there are none."""
        return str(record.meta.get("category", ""))

    def unit(self, record: Record) -> str:
        """The same for questions that count together, and so are drawn together; by default each stands alone."""
        return record.key

    def stratum(self, record: Record) -> str:
        """The part of the benchmark that `limit` draws from: by default its category.

        Where the category follows from the answer it is another, so that what is drawn does not depend on the truth.
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
        """A record without an answer, made to be asked all the same in its task's wording.

        Raises:
            SkipSample: the task cannot write it (yes_no never can: short_vqa has the same wording), or it has no id.
        """
        if not isinstance(record.meta.get("question_id"), int | str):
            raise SkipSample("question_id_missing", record.key)
        stand_in = record.choices[0] if record.choices else HIDDEN
        (turn,) = TASKS[record.task].turns(dataclasses.replace(record, answer=stand_in), Coordinates())
        return dataclasses.replace(record, turns=(Turn(turn.question, HIDDEN),))

    def submit(self, predictions: Sequence[Prediction], folder: Path) -> list[str]:
        """Write what a server or a judge needs to `folder`; returns a sentence about each file.

        By default, of hidden truth, a JSON list of {`server_id`, "answer"}; else nothing.
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
        """Ids of all questions that the server wants an answer to."""
        found = (found for _, found in self.read() if not isinstance(found, SkipSample))
        return [record.meta["question_id"] for records in found for record in records]

    def annotation(self, key: str, entry: Mapping[str, Any]) -> Record:
        """The record of an entry of the original's unified annotation.

        Raises:
            SkipSample: it is of no use; any of `MALFORMED` will do too.
        """
        image, question = text(entry["image_path"]), text(entry["question"])
        meta = {"question_id": entry.get("question_id")}
        if self.is_hidden:
            return self.unanswered(Record(key, "short_vqa", (ImageRef(image),), question=question, meta=meta))
        found = entry["gt_answers"]
        answers = [text(answer) for answer in (found if isinstance(found, list) else [found])]
        return question_record(key, image, question, answers[0], meta | {"answers": answers})

    def read(self) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        """As `AnnotationFiles.read`, also of a unified annotation; what cannot be asked or kept is bad."""
        for key, found in self._read():
            try:
                yield key, found if isinstance(found, SkipSample) else [_checked(record) for record in found]
            except SkipSample as bad:
                yield key, bad

    def _read(self) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        if self.unified is None:
            return super().read()
        items = enumerate(self.json_items(self.unified))
        entries = (
            (f"{number}-{entry['question_id']}" if "question_id" in entry else str(number), entry)
            for number, entry in items
        )
        return self.guarded(entries, lambda key, entry: [self.annotation(key, entry)])

    def judge(
        self, record: Record, answer: str, coordinates: Coordinates, images: tuple[ImageRef, ...] = ()
    ) -> Prediction:
        """Score an answer's text by the benchmark's rule; 0 where the truth is not public."""
        verdict = Verdict(0.0) if self.is_hidden else self.verdict(record, answer, coordinates)
        return dataclasses.replace(
            judge(record, answer, coordinates, images),
            benchmark=self.name,
            topic=self.category(record),
            metric=self.measures[0].name if self.measures else "",
            score=verdict.score,
            parsed=verdict.parsed,
        )


def command(*parts: str | Path) -> str:
    """A command line that is run in an official repository: paths from the root, what a shell would take apart in
    quotes."""
    return shlex.join(str(part.resolve()) if isinstance(part, Path) else part for part in parts)


def _checked(record: Record) -> Record:
    """The record, if its task can write it and JSON can hold it.

    Raises:
        SkipSample: why not.
    """
    entry = to_entry(record)
    again = to_record(entry, record.key, Path(), record.task)
    if record.sizes or not record.regions:  # sizes that an annotation does not say are read when the image is asked
        TASKS[record.task].turns(again, Coordinates())
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except MALFORMED as error:
        raise SkipSample("entry_malformed", f"{record.key}: {type(error).__name__}: {error}") from None
    return record


@dataclass
class BenchmarkConfig:
    """One entry of `benchmark` in conf/evaluate.yaml."""

    kind: str
    src: str
    split: Optional[str] = None
    images: Optional[str] = None

    def open(self, name: str) -> Benchmark:
        """Raises: UserError: an unknown kind or split, or a folder that is not there."""
        try:
            kind = BENCHMARKS[self.kind]
        except UserError as error:
            raise UserError(f"benchmark.{name}: {error}") from None
        return kind(Path(self.src), self.split, Path(self.images) if self.images else None)


@dataclass(frozen=True)
class Questions:
    """A benchmark with its records, image paths absolute, and what could not be used, by reason."""

    name: str
    benchmark: Benchmark
    records: Sequence[Record]
    lost: Mapping[str, int]

    def result(self, predictions: Sequence[Prediction], lost: Mapping[str, int], seed: int = 0) -> dict[str, Any]:
        """What results.json says of the benchmark: measures with their intervals, of all and of each category."""
        benchmark = self.benchmark
        values = [to_json(estimate(m.prepare(predictions), seed), m) | {"category": ""} for m in benchmark.measures]
        parts: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in predictions:
            for part in benchmark.groups(prediction):
                parts[part].append(prediction)
        if len(parts) > 1:
            for part, group in sorted(parts.items()):
                for m in benchmark.category_measures if part else ():
                    values.append(to_json(estimate(m.prepare(group), seed), m) | {"category": part})
        return {
            "name": self.name,
            "kind": benchmark.name,
            "title": benchmark.title,
            "family": benchmark.family,
            "split": benchmark.split,
            "url": benchmark.url,
            "n": len(predictions),
            "unparsed": sum(not prediction.parsed for prediction in predictions),
            "lost": dict(Counter(self.lost) + Counter(lost)),
            "values": values,
            "descriptions": {m.name: m.description for m in (*benchmark.measures, *benchmark.category_measures)},
        }


def load(name: str, benchmark: Benchmark, limit: int | None = None, seed: int = 0) -> Questions:
    """Read a benchmark's records.

    Args:
        limit: at most so many units of each category (`Benchmark.stratum`), drawn with `seed`; most are single
            questions.

    Raises:
        UserError: its files are missing or not what they should be, or hold no question.
    """
    benchmark.check()
    groups: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    lost: Counter[str] = Counter()
    for _, found in benchmark.read():
        if isinstance(found, SkipSample):
            lost[found.reason] += 1
            continue
        for record in found:
            paths = tuple(dataclasses.replace(i, path=str(benchmark.images / i.path)) for i in record.images)
            record = dataclasses.replace(record, key=f"{name}/{record.key}", images=paths)
            groups[benchmark.stratum(record)][benchmark.unit(record)].append(record)
    lost += benchmark.skipped + benchmark.left_out
    records: list[Record] = []
    rng = random.Random(seed)  # one for all: the same places in every category may all have the same answer
    for units in groups.values():
        drawn = list(units) if limit is None or len(units) <= limit else rng.sample(list(units), limit)
        records += [record for unit in drawn for record in units[unit]]
    if not records:
        raise UserError(f"{name}: no question in '{benchmark.src}' can be used ({dict(lost) or 'there is none'})")
    return Questions(name, benchmark, records, lost)


def choose(
    wanted: Sequence[str], configured: Mapping[str, Any], limit: int | None = None, seed: int = 0
) -> tuple[list[Questions], dict[str, str]]:
    """The questions of the benchmarks that names or patterns mean; of a pattern of those that can be asked.

    Args:
        limit, seed: as of `load`.

    Returns:
        The questions, and why the others that a pattern means are left out, by their names.

    Raises:
        UserError: a name that is not configured, a named one that cannot be asked, or nothing is left.
    """
    known = {name: values for name, values in configured.items() if name != ROOT}
    chosen: dict[str, Questions] = {}
    left_out: dict[str, str] = {}
    for pattern in wanted:
        names = [name for name in known if fnmatchcase(name, pattern)]
        if not names:
            raise UserError(f"benchmarks: no '{pattern}': {suggest(pattern, known, 'conf/benchmark')}")
        for name in names:
            if name in chosen:
                continue
            try:
                if known[name] is None:
                    raise UserError(f"benchmark.{name} is null, so it is switched off")
                if not isinstance(known[name], Mapping):
                    raise UserError(
                        f"benchmark.{name}={known[name]} must be a mapping such as {{kind: pope, src: FOLDER}}"
                    )
                config = build(BenchmarkConfig, known[name], f"benchmark.{name}")
                chosen[name] = load(name, config.open(name), limit, seed)
            except UserError as error:
                if name == pattern:
                    raise
                left_out[name] = str(error)
    if wanted and not chosen:
        reasons = "; ".join([*left_out.values()][:3])
        raise UserError(f"benchmarks: none of {', '.join(wanted)} can be asked: {reasons}")
    return list(chosen.values()), {name: why for name, why in left_out.items() if name not in chosen}


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
