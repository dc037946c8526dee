"""Metrics by name: one number in 0..1 for one prediction against one record.

The truth is the answer that the record's task writes in its evaluation wording, read back with the same parser as the
prediction. So a record scores the same whether it came with regions in pixels or with finished turns, and a task's own
answer always scores 1. A benchmark's official metric is one more `register` call.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sphinx_pl.data.geometry import Box4, Geometry, iou
from sphinx_pl.data.record import Record, Turn
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.registry import Registry

IOU_THRESHOLD = 0.5
PCK_ALPHA = 0.1

Score = Callable[[str, Record, Geometry], float]

# Reading tolerates any number of decimals, so whether a text parses does not depend on them.
_READER = Geometry()
_LETTER = re.compile(r"\s*\(?([A-Za-z])\s*(?:[).:,]|$)")


def _always(prediction: str) -> bool:
    return True


@dataclass(frozen=True)
class Metric:
    """`score(prediction, record, geometry)` is in 0..1; `parsed(prediction)`: whether it has the form asked for."""

    name: str
    score: Score
    description: str
    parsed: Callable[[str], bool] = _always


METRICS: Registry[Metric] = Registry("metric")


def register(name: str, score: Score, parsed: Callable[[str], bool] = _always) -> Metric:
    """Add a metric; its description is the docstring of `score`, which must define it."""
    description = " ".join((score.__doc__ or "").split())
    if not description:
        raise ValueError(f"metric '{name}': its score function needs a docstring that defines it")
    return METRICS.register(name, Metric(name, score, description, parsed))


def last_turn(record: Record, geometry: Geometry) -> Turn:
    """The question that an evaluation asks of a record, and its true answer.

    Raises:
        BadSample: the record lacks what its task needs.
    """
    return TASKS[record.task].turns(record, geometry, None)[-1]


def normalise(text: str) -> str:
    """Lower case, single spaces, no blanks around and no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def vqa_exact(prediction: str, record: Record, geometry: Geometry) -> float:
    """1 if the prediction equals the answer, both in lower case, with single spaces and without a final full stop."""
    return float(normalise(prediction) == normalise(last_turn(record, geometry).answer))


def text_exact(prediction: str, record: Record, geometry: Geometry) -> float:
    """1 if the prediction equals the answer but for white space; case and punctuation count."""
    return float(prediction.split() == last_turn(record, geometry).answer.split())


def choice(prediction: str, record: Record, geometry: Geometry) -> float:
    """1 if the prediction begins with the right choice's letter: "B", "b", "(B)", "B. text"; "Blue" is no letter."""
    return float(_letter(prediction) == _letter(last_turn(record, geometry).answer) is not None)


def caption_f1(prediction: str, record: Record, geometry: Geometry) -> float:
    """Harmonic mean of precision and recall of words (letters and digits, lower case), counted as often as they occur
    in both: the token F1 of SQuAD (Rajpurkar et al. 2016), articles kept."""
    predicted, true = _words(prediction), _words(last_turn(record, geometry).answer)
    return _f1((predicted & true).total(), predicted.total(), true.total())


def box_iou50(prediction: str, record: Record, geometry: Geometry) -> float:
    """1 if the first box of the prediction and the true box have an intersection over union of at least 0.5, in the
    padded square: the accuracy of referring expression comprehension (Mao et al. 2016)."""
    predicted, true = geometry.parse_boxes(prediction), geometry.parse_boxes(last_turn(record, geometry).answer)
    return float(bool(predicted and true) and iou(predicted[0], true[0]) >= IOU_THRESHOLD)


def detection_f1(prediction: str, record: Record, geometry: Geometry) -> float:
    """F1 of boxes, matched one to one, best overlap first, at an intersection over union of at least 0.5. Where there
    is nothing to find, 1 for the answer "None", else 0."""
    predicted, true = geometry.parse_boxes(prediction), geometry.parse_boxes(last_turn(record, geometry).answer)
    if not true:
        return float(_says_none(prediction))
    return _matched_f1([("", box) for box in predicted], [("", box) for box in true])


def grounded_f1(prediction: str, record: Record, geometry: Geometry) -> float:
    """F1 of pairs of a phrase and a box: matched one to one where the phrases are equal but for case and white space
    and the boxes' intersection over union is at least 0.5, best overlap first."""
    return _matched_f1(_pairs(prediction), _pairs(last_turn(record, geometry).answer))


def ocr_exact(prediction: str, record: Record, geometry: Geometry) -> float:
    """1 if the texts given with a box are the true ones in the same order; where the boxes lie is not judged."""
    predicted, true = geometry.parse_grounded(prediction), geometry.parse_grounded(last_turn(record, geometry).answer)
    return float(bool(true) and [item.phrase for item in predicted] == [item.phrase for item in true])


def keypoint_pck(prediction: str, record: Record, geometry: Geometry) -> float:
    """Share of the labelled keypoints whose predicted point of the same name lies within 0.1 of the diagonal of the
    person's box: the percentage of correct keypoints (Yang and Ramanan 2013), there with the box's longer side."""
    turn = last_turn(record, geometry)
    true, predicted = _named_points(turn.answer), _named_points(prediction)
    boxes = geometry.parse_boxes(turn.question)
    if not true or not boxes:
        return 0.0
    x1, y1, x2, y2 = boxes[0]
    reach = PCK_ALPHA * math.hypot(x2 - x1, y2 - y1)
    hits = sum(name in predicted and math.dist(predicted[name], point) <= reach for name, point in true.items())
    return hits / len(true)


def none(prediction: str, record: Record, geometry: Geometry) -> float:
    """Always 0: for tasks whose answers have no score of their own, such as plain text; results leave them out."""
    return 0.0


def _letter(text: str) -> str | None:
    match = _LETTER.match(text)
    return match[1].upper() if match else None


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _says_none(text: str) -> bool:
    return normalise(text) == "none"


def _pairs(text: str) -> list[tuple[str, Box4]]:
    return [(normalise(item.phrase), box) for item in _READER.parse_grounded(text) for box in item.boxes]


def _named_points(text: str) -> dict[str, tuple[float, float]]:
    """The first point of each name: a second one does not give a second chance."""
    points: dict[str, tuple[float, float]] = {}
    for item in _READER.parse_grounded(text):
        if item.points:
            points.setdefault(normalise(item.phrase), item.points[0])
    return points


def _f1(hits: int, predicted: int, true: int) -> float:
    return 2 * hits / (predicted + true) if hits else 0.0


def _matched_f1(predicted: Sequence[tuple[str, Box4]], true: Sequence[tuple[str, Box4]]) -> float:
    """F1 of a greedy one-to-one matching, best overlap first, between labelled boxes with equal labels."""
    overlaps = sorted(
        (
            (iou(box, truth), i, j)
            for i, (label, box) in enumerate(predicted)
            for j, (true_label, truth) in enumerate(true)
            if label == true_label
        ),
        key=lambda overlap: (-overlap[0], overlap[1:]),
    )
    used_predicted: set[int] = set()
    used_true: set[int] = set()
    for overlap, i, j in overlaps:
        if overlap >= IOU_THRESHOLD and i not in used_predicted and j not in used_true:
            used_predicted.add(i)
            used_true.add(j)
    return _f1(len(used_true), len(predicted), len(true))


register("vqa_exact", vqa_exact)
register("text_exact", text_exact)
register("choice", choice, lambda prediction: _letter(prediction) is not None)
register("caption_f1", caption_f1)
register("box_iou50", box_iou50, lambda prediction: bool(_READER.parse_boxes(prediction)))
register(
    "detection_f1",
    detection_f1,
    lambda prediction: _says_none(prediction) or bool(_READER.parse_boxes(prediction)),
)
register("grounded_f1", grounded_f1, lambda prediction: bool(_pairs(prediction)))
register("ocr_exact", ocr_exact, lambda prediction: bool(_READER.parse_grounded(prediction)))
register("keypoint_pck", keypoint_pck, lambda prediction: bool(_named_points(prediction)))
register("none", none)
