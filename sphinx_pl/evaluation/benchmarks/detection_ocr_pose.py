"""Detection, layout, pose and OCR by the figures of their own fields, on the questions of any
instruction file.

File: one that `kind: instructions` reads (`sphinx_pl.data.readers.instruction_json`), such as a
test file of `data.test`, or what a converter made of COCO's, DocLayNet's or HierText's validation
files. The split is the task whose records are asked.
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
from sphinx_pl.evaluation.benchmarks.base import Benchmark
from sphinx_pl.evaluation.bootstrap import Counts, Floats
from sphinx_pl.evaluation.metrics import Additive, Metric, mean, ratio
from sphinx_pl.evaluation.runner import Prediction
from sphinx_pl.evaluation.scorers.base import READER, Score
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
from sphinx_pl.evaluation.scorers.tasks import last_turn, scorer_of
from sphinx_pl.utils.errors import UserError

Asked = Sequence[tuple[Record, Prediction]]


class TaskBenchmark(Benchmark):
    """The questions of one task. Records whose boxes or points need the size of an image and lack
    it are skipped."""

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
        # The images' folder is put before the paths when they are loaded.
        source = InstructionReader(self.name, str(self.src / self.unified), root=".", tasks=[self.split])
        for index in range(len(source)):
            try:
                record = source.record(index)
                if self.needs_regions and not record.sizes:
                    raise SkipSample("size_unknown", record.key)
                # The annotation is the truth even where there are finished turns.
                last_turn(dataclasses.replace(record, turns=()) if self.needs_regions else record, READER)
                yield record.key, [record]
            except SkipSample as bad:
                yield str(index), bad

    def entries(self) -> Iterator[tuple[str, Any]]:
        return ((key, records) for key, records in self._read() if not isinstance(records, SkipSample))

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        return iter(entry)

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        """The score of one answer by its task's scorer. The metrics give the official figures."""
        return scorer_of(record)(answer, record, coordinates)


class APBenchmark(TaskBenchmark):
    """Tasks with average precision. A model gives no confidences, so all boxes count alike
    (`scorers.coco`)."""

    overlap: ClassVar[str] = "an intersection over union"

    def __init__(self, src: Path | None, split: str | None = None, images: Path | None = None) -> None:
        super().__init__(src, split, images)
        self._cached: dict[int, ResampledPrecision] = {}

    def check(self) -> None:
        check_coco_tools()

    @abstractmethod
    def match(self, asked: Asked) -> Any:
        """The `COCOeval` that has matched the answers; image ids are what `_image` gives."""

    def prepare(self, predictions: Sequence[Prediction]) -> ResampledPrecision:
        """The matched answers, which all metrics share; they differ in their thresholds."""
        name = hash(tuple((p.key, p.prediction) for p in predictions))
        if name not in self._cached:
            asked = [(to_record(p.record, p.key, Path(), p.task), p) for p in predictions]
            units = [str(image) for image in _sizes(asked)]
            self._cached[name] = ResampledPrecision(units, matched(self.match(asked)), range(10))
        return self._cached[name]

    @property
    def metrics(self) -> Sequence[Metric]:
        whole = f"COCO's AP: mean over categories and {self.overlap} of 0.50 to 0.95."
        return (
            AveragePrecision("AP", whole, self.prepare, range(10)),
            AveragePrecision("AP50", f"COCO's AP at {self.overlap} of 0.50.", self.prepare, (0,)),
            AveragePrecision("AP75", f"COCO's AP at {self.overlap} of 0.75.", self.prepare, (5,)),
        )


class DetectionBenchmark(APBenchmark):
    """Boxes of objects. The task detection names a class, and its precision is that of the classes
    asked about. A file that asks only about classes in the picture cannot show what a model sees
    elsewhere."""

    name = "detection"
    title = "Detection"
    splits = ("detection", "detection_all")

    def category(self, record: Record) -> str:
        return record.question.strip() if record.task == "detection" else ""

    def match(self, asked: Asked) -> Any:
        return _match_labelled(asked)


class LayoutBenchmark(APBenchmark):
    """Boxes of the parts of pages, such as DocLayNet's."""

    name = "layout"
    title = "Layout"
    splits = ("layout",)

    def match(self, asked: Asked) -> Any:
        return _match_labelled(asked)


class PoseBenchmark(APBenchmark):
    """Key points of a person whose box is given. Distances are relative to meta["area"], the
    person's area in square pixels, which COCO's converter writes. Without it the box's area counts,
    which is larger and so more lenient."""

    name = "pose"
    title = "Pose"
    url = "https://cocodataset.org/#keypoints-eval"
    splits = ("pose",)
    overlap = "an object keypoint similarity"

    def match(self, asked: Asked) -> Any:
        poses: list[Pose] = []
        truth: list[TruePose] = []
        for record, prediction in asked:
            image, (size,), person = _image(record), record.sizes, record.regions[0]
            keypoints = TASKS[record.task].parse(prediction.prediction, READER).keypoints(size)
            if any(visibility for *_, visibility in keypoints):
                poses.append(Pose(image, keypoints))
            x1, y1, x2, y2 = person.box
            area = float(record.meta.get("area") or (x2 - x1) * (y2 - y1))
            truth.append(TruePose(image, person.keypoints, person.box, area))
        return match_poses(poses, truth, _sizes(asked))


class OCRBenchmark(TaskBenchmark):
    """The texts of a picture in reading order, one a line. Places do not count, even where they are
    asked for."""

    name = "ocr"
    title = "OCR"
    url = "https://rrc.cvc.uab.es"
    splits = ("ocr_text", "ocr")
    needs_regions = False

    def score(self, record: Record, answer: str, coordinates: Coordinates) -> Score:
        return Score(text_similarity(*_texts(record, answer)), scorer_of(record).parsed(answer, record))

    @property
    def metrics(self) -> Sequence[Metric]:
        similarity = "Mean of 1 minus the edit distance of the text divided by the length of the longer one."
        errors = "Edit distances of all texts divided by the true ones' characters; it can be above 100 %."
        return mean("1-NED", similarity), Additive("character error rate", errors, _errors, ratio)


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision as a `Metric`, whose units are images.

    Args:
        prepared: the matched answers, which all metrics of the same predictions share.
        thresholds: indices of the thresholds that the mean is over.
    """

    name: str
    description: str
    prepared: Callable[[Sequence[Prediction]], ResampledPrecision]
    thresholds: Sequence[int]
    percent: bool = True

    def prepare(self, predictions: Sequence[Prediction]) -> ResampledPrecision:
        return dataclasses.replace(self.prepared(predictions), thresholds=self.thresholds)


@dataclass(frozen=True)
class ResampledPrecision:
    """Average precision of resampled images; `units` are those, in the order of `Matched`."""

    units: Sequence[str]
    categories: Sequence[Matched]
    thresholds: Sequence[int]

    def values(self, counts: Counts) -> Floats:
        return average_precision(self.categories, counts, self.thresholds)


def _image(record: Record) -> str:
    return record.images[0].path


def _sizes(asked: Asked) -> dict[ImageId, Size]:
    """The sizes of the images that were asked about, in the order of the questions."""
    return {_image(record): record.sizes[0] for record, _ in asked}


def _match_labelled(asked: Asked) -> Any:
    """The matched boxes. Labels are compared in lower case; the task detection's are the label
    asked for."""
    detections: list[Detection] = []
    truth: list[TrueBox] = []
    for record, prediction in asked:
        image, (size,) = _image(record), record.sizes
        parsed: Parsed = TASKS[record.task].parse(prediction.prediction, READER)
        wanted = record.question.strip() if record.task == "detection" else None
        for region in parsed.regions(size):
            detections.append(Detection(image, normalise(wanted or region.label), region.box))
        for region in record.regions:
            if wanted is None or region.label.strip() == wanted:
                truth.append(TrueBox(image, normalise(region.label), region.box))
    return match_boxes(detections, truth, _sizes(asked))


def _texts(record: Record, answer: str) -> tuple[str, str]:
    """The answer's text and the true text, with a line for each piece."""
    parse = TASKS[record.task].parse
    predicted, true = (
        "\n".join(" ".join(place.phrase.split()) for place in parse(text, READER).places)
        for text in (answer, last_turn(record, READER).answer)
    )
    return predicted, true


def _errors(group: Sequence[Prediction]) -> tuple[float, float]:
    """The edits that make the answer the true text, and the true text's characters."""
    (prediction,) = group
    record = to_record(prediction.record, prediction.key, Path(), prediction.task)
    predicted, true = _texts(record, prediction.prediction)
    return float(edit_distance(predicted, true)), float(len(true))
