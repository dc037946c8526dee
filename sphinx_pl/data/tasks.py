"""All instruction wordings, and how each task writes its question and answer from a record.

The first wording of a task is what evaluation uses. Where the original's demo or evaluation has a prompt, it is that
one; the others are ours. Adding a task is one `_task(...)` call: a name, wordings, a scorer and a function that fills
the wording's slots and writes the answer.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.geometry import COCO_KEYPOINTS, Box4, Geometry, Size
from sphinx_pl.data.record import Record, Region, Turn
from sphinx_pl.registry import Registry

# Annotation tools disagree on whether the last pixel is inside, so a box may pass the image's edge by this much.
EDGE_TOLERANCE = 1.0

Writer = Callable[[Record, Geometry], tuple[dict[str, str], str]]


@dataclass(frozen=True)
class Task:
    """One kind of question. `scorer` names an entry of the metric registry, `max_new_tokens` bounds the answer."""

    name: str
    templates: tuple[str, ...]
    write: Writer  # -> (values for the wording's slots, answer)
    scorer: str
    max_new_tokens: int
    needs_image: bool = True

    def turns(self, record: Record, geometry: Geometry, rng: random.Random | None = None) -> tuple[Turn, ...]:
        """The conversation of a record: its own turns where it has them, else one written from its annotations.

        Args:
            rng: chooses the wording; None takes the first.

        Raises:
            BadSample: the record lacks what the task needs, or its geometry is impossible.
        """
        if self.needs_image and not record.images:
            raise BadSample("image_absent", f"{record.key} has no image, its task {self.name} needs one")
        turns = record.turns or (self._write(record, geometry, rng),)
        if any(not turn.answer.strip() for turn in turns):
            raise BadSample("answer_empty", record.key)
        return turns

    def _write(self, record: Record, geometry: Geometry, rng: random.Random | None) -> Turn:
        slots, answer = self.write(record, geometry)
        template = rng.choice(self.templates) if rng else self.templates[0]
        return Turn(template.format(**slots), answer)


TASKS: Registry[Task] = Registry("task")


def _task(
    name: str,
    write: Writer,
    scorer: str,
    max_new_tokens: int,
    *templates: str,
    needs_image: bool = True,
) -> None:
    TASKS.register(name, Task(name, templates, write, scorer, max_new_tokens, needs_image))


def choice_letter(record: Record) -> str:
    """The letter ("A", "B", ...) of a record's answer among its choices.

    Raises:
        BadSample: the answer is not one of the choices, or there are more than 26.
    """
    if not 2 <= len(record.choices) <= len(string.ascii_uppercase):
        raise BadSample("choices_count", f"{record.key} has {len(record.choices)} choices")
    if record.answer not in record.choices:
        raise BadSample("answer_not_in_choices", record.key)
    return string.ascii_uppercase[record.choices.index(record.answer)]


def reading_order(regions: Iterable[Region]) -> list[Region]:
    """Regions line by line from the top, each line from the left.

    A region is on the line that an earlier (higher) one opened if its vertical middle is above that one's lower edge.
    """
    ordered: list[Region] = []
    line: list[Region] = []
    for region in sorted(regions, key=lambda region: (region.box[1], region.box[0])):
        if line and (region.box[1] + region.box[3]) / 2 >= line[0].box[3]:
            ordered += sorted(line, key=lambda region: region.box[0])
            line = []
        line.append(region)
    return ordered + sorted(line, key=lambda region: region.box[0])


def _size(record: Record) -> Size:
    if not record.sizes:
        raise BadSample("size_unknown", f"{record.key} has geometry but its image has no width and height")
    return record.sizes[0]


def _checked_box(record: Record, region: Region) -> Box4:
    """The region's box, cut at the image's edges."""
    width, height = _size(record)
    x1, y1, x2, y2 = region.box
    if not (x1 < x2 and y1 < y2):  # also true of NaN
        raise BadSample("box_inverted", f"{record.key}: {region.box}")
    if min(x1, y1) < -EDGE_TOLERANCE or x2 > width + EDGE_TOLERANCE or y2 > height + EDGE_TOLERANCE:
        raise BadSample("box_outside", f"{record.key}: {region.box} in {width}x{height}")
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
    if not (x1 < x2 and y1 < y2):
        raise BadSample("box_outside", f"{record.key}: {region.box} in {width}x{height}")
    return x1, y1, x2, y2


def _regions(record: Record) -> tuple[Region, ...]:
    if not record.regions:
        raise BadSample("region_missing", record.key)
    return record.regions


def _label(record: Record, region: Region) -> str:
    label = region.label.strip()
    if not label:
        raise BadSample("label_empty", record.key)
    if "<p>" in label or "</p>" in label:
        raise BadSample("label_markup", f"{record.key}: {label}")
    return label


def _question(record: Record) -> str:
    question = record.question.strip()
    if not question:
        raise BadSample("question_empty", record.key)
    return question


def _answer(record: Record) -> str:
    return record.answer.strip()  # an empty one is refused by Task.turns, for every task


def _grounded(record: Record, geometry: Geometry, region: Region) -> str:
    return geometry.grounded(_label(record, region), [_checked_box(record, region)], _size(record))


def _write_question(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    return {"question": _question(record)}, _answer(record)


def _write_choice(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    answer = choice_letter(record)
    lines = (f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, record.choices, strict=False))
    return {"question": _question(record), "choices": "\n".join(lines)}, answer


def _write_answer(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    return {}, _answer(record)


def _write_rec(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    box = _checked_box(record, _regions(record)[0])
    return {"phrase": _question(record).rstrip(".")}, geometry.box(box, _size(record))


def _write_reg(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    region = _regions(record)[0]
    return {"box": geometry.box(_checked_box(record, region), _size(record))}, _label(record, region)


def _write_grounded_caption(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    def phrase(match: re.Match[str]) -> str:
        index = int(match[1])
        if index >= len(record.regions):
            raise BadSample("region_missing", f"{record.key} mentions region {index} of {len(record.regions)}")
        return _grounded(record, geometry, record.regions[index])

    answer, mentioned = re.subn(r"\{([0-9]{1,4})\}", phrase, _answer(record))
    if answer and not mentioned:
        raise BadSample("region_missing", f"{record.key} mentions no region")
    return {}, answer


def _write_detection(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    label = _question(record)
    found = reading_order(region for region in record.regions if region.label == label)
    boxes = [_checked_box(record, region) for region in found]
    return {"label": label}, geometry.boxes(boxes, _size(record)) if boxes else "None"


def _write_ocr(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    return {}, "".join(_grounded(record, geometry, region) for region in reading_order(_regions(record)))


def _write_pose(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    person = _regions(record)[0]
    size = _size(record)
    if len(person.keypoints) != len(COCO_KEYPOINTS):
        raise BadSample("keypoints_count", f"{record.key} has {len(person.keypoints)}, not {len(COCO_KEYPOINTS)}")
    present = [(x, y) for x, y, visibility in person.keypoints if visibility]
    if not present:
        raise BadSample("keypoints_absent", record.key)
    if any(
        not (-EDGE_TOLERANCE <= value <= limit + EDGE_TOLERANCE)
        for point in present
        for value, limit in zip(point, size, strict=True)
    ):
        raise BadSample("keypoint_outside", record.key)
    return {"box": geometry.box(_checked_box(record, person), size)}, geometry.keypoints(person.keypoints, size)


def _write_layout(record: Record, geometry: Geometry) -> tuple[dict[str, str], str]:
    groups: dict[str, list[Box4]] = {}
    for region in reading_order(_regions(record)):
        groups.setdefault(_label(record, region), []).append(_checked_box(record, region))
    return {}, "".join(geometry.grounded(label, boxes, _size(record)) for label, boxes in groups.items())


_task(
    "short_vqa",
    _write_question,
    "vqa_exact",
    10,
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nGive a short answer.",
)
_task(
    "relation",
    _write_question,
    "vqa_exact",
    10,
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nGive a short answer.",
)
_task(
    "multiple_choice",
    _write_choice,
    "choice",
    10,
    "{question}\n{choices}\nAnswer with the option's letter from the given choices directly.",
    "{question}\n{choices}\nReply with the letter of the right option.",
)
_task(
    "description",
    _write_answer,
    "caption_f1",
    256,
    "Generate a detailed description about the image.",
    "Describe this image in detail.",
    "What is in this image? Tell me everything that you see.",
)
_task(
    "caption",
    _write_answer,
    "caption_f1",
    64,
    "Provide a one-sentence caption for the provided image.",
    "Describe the image in one sentence.",
    "Write a short caption for this image.",
)
_task(
    "rec",
    _write_rec,
    "box_iou50",
    30,
    "Please provide the bounding box coordinate of the region this sentence describes: {phrase}.",
    "Where is {phrase}? Answer with its bounding box.",
)
_task(
    "reg",
    _write_reg,
    "text_exact",
    32,
    "Please provide a short description for this region: {box}.",
    "What is in the region {box}? Describe it briefly.",
)
_task(
    "grounded_caption",
    _write_grounded_caption,
    "grounded_f1",
    256,
    "Describe the image concisely. Include the bounding box for each mentioned object.",
    "Give a brief description of the image with the bounding box of every object that you mention.",
)
_task(
    "detection",
    _write_detection,
    "detection_f1",
    256,
    "Detect all {label} shown in the image.",
    "Find every {label} in the image and give the bounding boxes.",
)
_task(
    "ocr",
    _write_ocr,
    "ocr_exact",
    256,
    "Please detect all texts and provide their bounding box coordinate.",
    "Read all the text in the image and give the bounding box of each piece.",
)
_task(
    "pose",
    _write_pose,
    "keypoint_pck",
    512,
    "Detect the key points of the person in the region {box}.",
    "Where are the body key points of the person in {box}?",
)
_task(
    "layout",
    _write_layout,
    "grounded_f1",
    256,
    "Detect the layout elements of this page and provide their bounding box coordinate.",
    "Which parts does this page have? Give the bounding boxes of each kind.",
)
_task("chat", _write_question, "vqa_exact", 256, "{question}", needs_image=False)
# A document of plain text: no instruction, and all of it is supervised.
_task("text", lambda record, geometry: ({}, record.answer), "none", 64, "", needs_image=False)
