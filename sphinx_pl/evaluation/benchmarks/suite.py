"""The project's own tasks by the figures that detectors and readers of text are measured by: of any instruction file.

File: one that `kind: instructions` reads (`sphinx_pl.data.readers.instruction_json`), such as a test file of
`data.test`, or what a converter made of COCO's, DocLayNet's or HierText's validation files. The split is the task
whose records are asked.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sphinx_pl.data.answer_parsing import normalise
from sphinx_pl.data.coordinates import Coordinates, Size
from sphinx_pl.data.readers import InstructionReader
from sphinx_pl.data.readers.instruction_json import to_record
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS, Parsed
from sphinx_pl.evaluation.benchmarks import Benchmark, Verdict
from sphinx_pl.evaluation.measures import Additive, Counts, Floats, Measure, mean, ratio
from sphinx_pl.evaluation.metrics import METRICS, last_turn
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.coco import (
    Detection,
    ImageId,
    Pose,
    TrueBox,
    TruePose,
    check_coco_tools,
    match_boxes,
    match_poses,
)
from sphinx_pl.evaluation.scorers.edits import edit_distance
from sphinx_pl.evaluation.scorers.ocr import text_similarity
from sphinx_pl.evaluation.scorers.resampled_ap import Matched, average_precision, matched
from sphinx_pl.utils.errors import UserError

# Reading tolerates any number of decimals.
_READER = Coordinates()

Asked = Sequence[tuple[Record, Prediction]]


class TaskSuite(Benchmark):
    """Records whose boxes or points have no size of an image to be measured by are left out, and counted."""

    url = "https://cocodataset.org/#detection-eval"
    licence = "the file's own"
    family = "tasks"
    needs_regions: ClassVar[bool] = True

    def __init__(self, src: Path | None, split: str | None = None, images: Path | None = None) -> None:
        super().__init__(src, split, images)
        if src is not None and self.unified is None:
            raise UserError(f"{self.name}: '{src}' is a folder: name an instruction file with the task {self.split}")

    def _read(self) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        assert self.unified is not None
        # Their images' folder is put before the paths when they are loaded.
        source = InstructionReader(self.name, str(self.src / self.unified), root=".", tasks=[self.split])
        for index in range(len(source)):
            try:
                record = source.record(index)
                if self.needs_regions and not record.sizes:
                    raise SkipSample("size_unknown", record.key)
                # Of finished turns too the annotation is what is scored by.
                last_turn(dataclasses.replace(record, turns=()) if self.needs_regions else record, _READER)
                yield record.key, [record]
            except SkipSample as bad:
                yield str(index), bad

    def entries(self) -> Iterator[tuple[str, Any]]:
        return ((key, found) for key, found in self._read() if not isinstance(found, SkipSample))

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        return iter(entry)

    def verdict(self, record: Record, answer: str, coordinates: Coordinates) -> Verdict:
        """What a single answer scores, by the metric of its task; the official figures are the measures'."""
        metric = METRICS[TASKS[record.task].scorer]
        return Verdict(metric.score(answer, record, coordinates), metric.parsed(answer, record))


class _Precision(TaskSuite):
    """A model gives no confidences, so that every box counts as much: see `sphinx_pl.evaluation.scorers.coco`."""

    overlap: ClassVar[str] = "an intersection over union"

    def __init__(self, src: Path | None, split: str | None = None, images: Path | None = None) -> None:
        super().__init__(src, split, images)
        self._known: dict[int, Resampled] = {}

    def check(self) -> None:
        check_coco_tools()

    @abstractmethod
    def match(self, asked: Asked) -> Any:
        """The `COCOeval` that has matched the answers; image ids are what `_image` gives."""

    def prepare(self, predictions: Sequence[Prediction]) -> Resampled:
        """Matched once for all measures, which differ in the thresholds that they average over."""
        name = hash(tuple((p.key, p.prediction) for p in predictions))
        if name not in self._known:
            asked = [(to_record(p.record, p.key, Path(), p.task), p) for p in predictions]
            units = [str(image) for image in _sizes(asked)]
            self._known[name] = Resampled(units, matched(self.match(asked)), range(10))
        return self._known[name]

    @property
    def measures(self) -> Sequence[Measure]:
        whole = f"COCO's AP: mean over categories and {self.overlap} of 0.50 to 0.95."
        return (
            Precision("AP", whole, self.prepare, range(10)),
            Precision("AP50", f"COCO's AP at {self.overlap} of 0.50.", self.prepare, (0,)),
            Precision("AP75", f"COCO's AP at {self.overlap} of 0.75.", self.prepare, (5,)),
        )


class DetectionSuite(_Precision):
    """Boxes of objects. Of the task detection, which names a class, precision is that of the classes asked about: a
    file with questions only about what is in the picture cannot show what a model sees elsewhere."""

    name = "detection"
    title = "Detection"
    splits = ("detection", "detection_all")

    def category(self, record: Record) -> str:
        return record.question.strip() if record.task == "detection" else ""

    def match(self, asked: Asked) -> Any:
        return _match_labelled(asked)


class LayoutSuite(_Precision):
    """Boxes of the parts of pages, such as DocLayNet's."""

    name = "layout"
    title = "Layout"
    splits = ("layout",)

    def match(self, asked: Asked) -> Any:
        return _match_labelled(asked)


class PoseSuite(_Precision):
    """Key points of a person whose box is given. Distances are measured by meta["area"], the person's in square pixels,
    as COCO's converter writes it; without it by the box's area, which is larger and so more lenient."""

    name = "pose"
    title = "Pose"
    url = "https://cocodataset.org/#keypoints-eval"
    splits = ("pose",)
    overlap = "an object keypoint similarity"

    def match(self, asked: Asked) -> Any:
        found: list[Pose] = []
        truth: list[TruePose] = []
        for record, prediction in asked:
            image, (size,), person = _image(record), record.sizes, record.regions[0]
            said = TASKS[record.task].parse(prediction.prediction, _READER).keypoints(size)
            if any(visibility for *_, visibility in said):
                found.append(Pose(image, said))
            x1, y1, x2, y2 = person.box
            area = float(record.meta.get("area") or (x2 - x1) * (y2 - y1))
            truth.append(TruePose(image, person.keypoints, person.box, area))
        return match_poses(found, truth, _sizes(asked))


class OcrSuite(TaskSuite):
    """The texts of a picture in reading order, one a line; where a place is asked for too, it is not judged."""

    name = "ocr"
    title = "OCR"
    url = "https://rrc.cvc.uab.es"
    splits = ("ocr_text", "ocr")
    needs_regions = False

    def verdict(self, record: Record, answer: str, coordinates: Coordinates) -> Verdict:
        said, true = _texts(record, answer)
        return Verdict(text_similarity(said, true), METRICS[TASKS[record.task].scorer].parsed(answer, record))

    @property
    def measures(self) -> Sequence[Measure]:
        similarity = "Mean of 1 minus the edit distance of the text divided by the length of the longer one."
        errors = "Edit distances of all texts divided by the true ones' characters; it can be above 100 %."
        return mean("1-NED", similarity), Additive("character error rate", errors, _errors, ratio)


@dataclass(frozen=True)
class Precision:
    """Average precision as a `Measure`, whose units are images.

    Args:
        prepared: what all measures of the same predictions share.
        thresholds: indices of those that the mean is taken over.
    """

    name: str
    description: str
    prepared: Callable[[Sequence[Prediction]], Resampled]
    thresholds: Sequence[int]
    percent: bool = True

    def prepare(self, predictions: Sequence[Prediction]) -> Resampled:
        return dataclasses.replace(self.prepared(predictions), thresholds=self.thresholds)


@dataclass(frozen=True)
class Resampled:
    """Average precision of resampled images; `units` are those, in the order of `Matched`."""

    units: Sequence[str]
    categories: Sequence[Matched]
    thresholds: Sequence[int]

    def values(self, counts: Counts) -> Floats:
        return average_precision(self.categories, counts, self.thresholds)


def _image(record: Record) -> str:
    return record.images[0].path


def _sizes(asked: Asked) -> dict[ImageId, Size]:
    """Sizes of the images that were asked about, in the order of the questions."""
    return {_image(record): record.sizes[0] for record, _ in asked}


def _match_labelled(asked: Asked) -> Any:
    """Boxes with labels, which are compared in lower case; those of the task detection have the label asked for."""
    found: list[Detection] = []
    truth: list[TrueBox] = []
    for record, prediction in asked:
        image, (size,) = _image(record), record.sizes
        said: Parsed = TASKS[record.task].parse(prediction.prediction, _READER)
        wanted = record.question.strip() if record.task == "detection" else None
        for region in said.regions(size):
            found.append(Detection(image, normalise(wanted or region.label), region.box))
        for region in record.regions:
            if wanted is None or region.label.strip() == wanted:
                truth.append(TrueBox(image, normalise(region.label), region.box))
    return match_boxes(found, truth, _sizes(asked))


def _texts(record: Record, answer: str) -> tuple[str, str]:
    """The answer's text and the true one, a line for each piece."""
    parse = TASKS[record.task].parse
    said, true = (
        "\n".join(" ".join(place.phrase.split()) for place in parse(text, _READER).places)
        for text in (answer, last_turn(record, _READER).answer)
    )
    return said, true


def _errors(group: Sequence[Prediction]) -> tuple[float, float]:
    """Edits that make the answer the true text, and its characters."""
    (prediction,) = group
    record = to_record(prediction.record, prediction.key, Path(), prediction.task)
    said, true = _texts(record, prediction.prediction)
    return float(edit_distance(said, true)), float(len(true))
