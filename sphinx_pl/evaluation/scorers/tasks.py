"""The scorers of the tasks, by name: each turns one answer to a record into a `Score`.

The truth is the answer that the record's task writes in its evaluation wording. The task's own
parser reads it, as it reads the prediction. So a record scores the same whether it has regions in
pixels or finished turns, and a task's own answer always scores 1. A scorer of your own is one more
`register` call.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sphinx_pl.data.answer_parsing import normalise, read_letter
from sphinx_pl.data.coordinates import Box4, Coordinates, Grounded, Point2, iou, to_square
from sphinx_pl.data.schema import Record, Turn
from sphinx_pl.data.tasks import (
    TASKS,
    AnswerReader,
    Parsed,
    read_boxes,
    read_detection,
    read_grounded,
    read_keypoints,
    read_lines,
    read_ocr,
    read_yes_no,
)
from sphinx_pl.evaluation.scorers.base import READER, Score
from sphinx_pl.evaluation.scorers.edits import similarity
from sphinx_pl.evaluation.scorers.exact import exact_match
from sphinx_pl.evaluation.scorers.grounding import IOU_THRESHOLD
from sphinx_pl.utils.registry import Registry

_OPTION = re.compile(r"^[A-Z]\. (.*)$", re.MULTILINE)
PCK_ALPHA = 0.1

Value = Callable[[str, Record, Coordinates], float]
"""(prediction, record, geometry) -> 0 to 1."""
IsParsed = Callable[[str, Record], bool]
"""(prediction, record) -> whether the prediction has the form that the question asks for."""


def _always(prediction: str, record: Record) -> bool:
    return True


def _formed(read: AnswerReader) -> IsParsed:
    return lambda prediction, record: read(prediction, READER).formed


@dataclass(frozen=True)
class Scorer:
    """A way to score the answers of a task. `description` is its definition in words."""

    name: str
    value: Value
    description: str
    parsed: IsParsed = _always

    def __call__(self, prediction: str, record: Record, coordinates: Coordinates) -> Score:
        return Score(self.value(prediction, record, coordinates), self.parsed(prediction, record))


SCORERS: Registry[Scorer] = Registry("scorer")


def register(name: str, value: Value, parsed: IsParsed = _always) -> Scorer:
    """Add a scorer; its description is the docstring of `value`, which must define it."""
    description = " ".join((value.__doc__ or "").split())
    if not description:
        raise ValueError(f"scorer '{name}': its function needs a docstring that defines it")
    return SCORERS.register(name, Scorer(name, value, description, parsed))


def scorer_of(record: Record) -> Scorer:
    """The scorer of the record's task."""
    return SCORERS[TASKS[record.task].scorer]


def last_turn(record: Record, coordinates: Coordinates) -> Turn:
    """The question that an evaluation asks of a record, and its true answer.

    Raises:
        SkipSample: the record lacks what its task needs.
    """
    return TASKS[record.task].turns(record, coordinates, None)[-1]


def _both(prediction: str, record: Record, coordinates: Coordinates) -> tuple[Parsed, Parsed]:
    """The prediction and the record's own answer as its task reads them."""
    parse = TASKS[record.task].parse
    return parse(prediction, coordinates), parse(last_turn(record, coordinates).answer, coordinates)


def vqa_exact(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """1 if the prediction equals the answer, both in lower case, with single spaces and without a
    final full stop."""
    return float(exact_match(prediction, [last_turn(record, coordinates).answer]))


def text_exact(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """1 if the prediction equals the answer but for white space; case and punctuation count."""
    return float(prediction.split() == last_turn(record, coordinates).answer.split())


def yes_no(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """1 if the prediction begins with the right one of the words yes and no, in any case: "No.",
    "yes, it is"."""
    predicted, true = _both(prediction, record, coordinates)
    return float(predicted.formed and predicted.answer == true.answer)


def choice(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """1 if the prediction begins with the right choice's letter and names no other: "B", "b",
    "(B)", "B. text"; "Blue" is no letter, and "A. cat B. dog" names two."""
    true = TASKS[record.task].parse(last_turn(record, coordinates).answer, coordinates)
    return float(true.formed and read_letter(prediction, _options(record)) == true.answer)


def _options(record: Record) -> Sequence[str]:
    """The texts of the choices. Finished turns have those that the question lists."""
    return record.choices or _OPTION.findall(record.turns[-1].question if record.turns else "")


def _names_letter(prediction: str, record: Record) -> bool:
    return read_letter(prediction, _options(record)) is not None


def caption_f1(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """Harmonic mean of precision and recall of words (letters and digits, lower case), counted as
    often as they occur in both: the token F1 of SQuAD (Rajpurkar et al. 2016), articles kept."""
    return _words_f1(prediction, last_turn(record, coordinates).answer)


def box_iou50(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """1 if the first box of the prediction and the true box have an intersection over union of at
    least 0.5, in the padded square: the accuracy of referring expression comprehension (Mao et al.
    2016)."""
    predicted, true = (parsed.boxes for parsed in _both(prediction, record, coordinates))
    return float(bool(predicted and true) and iou(predicted[0], true[0]) >= IOU_THRESHOLD)


def detection_f1(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """F1 of boxes, matched one to one, best overlap first, at an intersection over union of at
    least 0.5. Where there is nothing to find, the answer "None" scores 1 and any other 0."""
    predicted, true = _both(prediction, record, coordinates)
    if not true.boxes:
        return float(predicted.formed and not predicted.boxes)
    return _matched_f1([("", box) for box in predicted.boxes], [("", box) for box in true.boxes])


def grounded_f1(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """F1 of pairs of a phrase and a box: matched one to one where the phrases are equal but for
    case and white space and the boxes' intersection over union is at least 0.5, best overlap first.
    """
    predicted, true = _both(prediction, record, coordinates)
    return _matched_f1(_pairs(predicted), _pairs(true))


def grounded_answer(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """Mean of two scores: the F1 of the words without the boxes, as in caption_f1, and the F1 of
    the pairs of a phrase and a box, as in grounded_f1."""
    words = (_without_boxes(text, coordinates) for text in (prediction, last_turn(record, coordinates).answer))
    return (_words_f1(*words) + grounded_f1(prediction, record, coordinates)) / 2


def ocr_exact(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """1 if the texts given with a box are the true ones in the same order. The places of the boxes
    do not count."""
    predicted, true = ([place.phrase for place in parsed.places] for parsed in _both(prediction, record, coordinates))
    return float(bool(true) and predicted == true)


def edit_similarity(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """1 minus the edit distance (Levenshtein 1966) of the prediction to the true text, divided by
    the length of the longer; each line's white space counts as single blanks, case counts."""
    predicted, true = (
        "\n".join(" ".join(place.phrase.split()) for place in parsed.places)
        for parsed in _both(prediction, record, coordinates)
    )
    return similarity(predicted, true) if predicted or true else 0.0


def keypoint_pck(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """Share of the labelled keypoints whose predicted point of the same name lies within 0.1 of the
    diagonal of the person's box: the percentage of correct keypoints (Yang and Ramanan 2013), there
    with the box's longer side."""
    predicted, true = (_named_points(parsed.places) for parsed in _both(prediction, record, coordinates))
    if not true:
        return 0.0
    x1, y1, x2, y2 = _persons_box(record, coordinates, list(true.values()))
    reach = PCK_ALPHA * math.hypot(x2 - x1, y2 - y1)
    hits = sum(name in predicted and math.dist(predicted[name], point) <= reach for name, point in true.items())
    return hits / len(true)


def none(prediction: str, record: Record, coordinates: Coordinates) -> float:
    """Always 0, for tasks without a score, such as plain text. Results leave them out."""
    return 0.0


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _words_f1(text: str, truth: str) -> float:
    predicted, true = _words(text), _words(truth)
    return _f1((predicted & true).total(), predicted.total(), true.total())


def _without_boxes(text: str, coordinates: Coordinates) -> str:
    return "".join(part if isinstance(part, str) else part.phrase for part in coordinates.cut_grounded(text))


def _pairs(parsed: Parsed) -> list[tuple[str, Box4]]:
    return [(normalise(place.phrase), box) for place in parsed.places for box in place.boxes]


def _named_points(places: Sequence[Grounded]) -> dict[str, Point2]:
    """The first point of each name. A second point of a name does not count."""
    return {normalise(place.phrase): place.points[0] for place in reversed(places) if place.points}


def _persons_box(record: Record, coordinates: Coordinates, points: Sequence[Point2]) -> Box4:
    """The person's box in fractions: from the question, else from the record, else the extent of
    the keypoints.

    The question has no box where it names the person by a phrase.
    """
    if boxes := coordinates.parse_boxes(last_turn(record, coordinates).question):
        return boxes[0]
    if record.regions and record.sizes:
        return to_square(record.regions[0].box, record.sizes[0])
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _f1(hits: int, predicted: int, true: int) -> float:
    return 2 * hits / (predicted + true) if hits else 0.0


def _matched_f1(predicted: Sequence[tuple[str, Box4]], true: Sequence[tuple[str, Box4]]) -> float:
    """F1 of a greedy one-to-one matching of boxes with equal labels, best overlap first."""
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
register("yes_no", yes_no, _formed(read_yes_no))
register("choice", choice, _names_letter)
register("caption_f1", caption_f1)
register("box_iou50", box_iou50, _formed(read_boxes))
register("detection_f1", detection_f1, _formed(read_detection))
register("grounded_f1", grounded_f1, _formed(read_grounded))
register("grounded_answer", grounded_answer, _formed(read_grounded))
register("ocr_exact", ocr_exact, _formed(read_ocr))
register("edit_similarity", edit_similarity, _formed(read_lines))
register("keypoint_pck", keypoint_pck, _formed(read_keypoints))
register("none", none)
