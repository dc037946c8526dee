"""Record -> (values for the slots of a wording, answer): one function for each form of answer."""

from __future__ import annotations

import string

from sphinx_pl.data.answer_parsing import normalise
from sphinx_pl.data.coordinates import COCO_KEYPOINTS, Box4, Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks.fields import (
    EDGE_TOLERANCE,
    answer_text,
    checked_box,
    choice_letter,
    grounded_answer,
    grounded_text,
    label_of,
    question_text,
    reading_order,
    regions_of,
    size_of,
)


def write_question(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    return {"question": question_text(record)}, answer_text(record)


def write_choice(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    answer = choice_letter(record)
    # A line break inside a choice could make two of it.
    choices = (" ".join(choice.split()) for choice in record.choices)
    lines = (f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))
    return {"question": question_text(record), "choices": "\n".join(lines)}, answer


def write_answer(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    return {}, answer_text(record)


def write_rec(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    box = checked_box(record, regions_of(record)[0])
    return {"phrase": question_text(record).rstrip(".")}, coordinates.box(box, size_of(record))


def write_reg(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    region = regions_of(record)[0]
    return {"box": coordinates.box(checked_box(record, region), size_of(record))}, label_of(record, region)


def write_yes_no(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    answer = normalise(record.answer)
    if answer and answer not in ("yes", "no"):
        raise SkipSample("answer_not_yes_no", f"{record.key}: {record.answer}")
    return {"question": question_text(record)}, answer


def write_grounded_caption(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    return {}, grounded_answer(record, coordinates)


def write_grounded_vqa(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    return {"question": question_text(record)}, grounded_answer(record, coordinates)


def write_detection(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    label = question_text(record)
    # A region without a label could be one of those that are asked for.
    regions = reading_order(region for region in record.regions if label_of(record, region) == label)
    boxes = [checked_box(record, region) for region in regions]
    return {"label": label}, coordinates.boxes(boxes, size_of(record)) if boxes else "None"


def write_ocr(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    return {}, "".join(grounded_text(record, coordinates, region) for region in reading_order(regions_of(record)))


def write_ocr_text(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    # A line break inside a label would make two texts of it.
    return {}, "\n".join(" ".join(label_of(record, region).split()) for region in reading_order(regions_of(record)))


def write_pose(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    person = regions_of(record)[0]
    size = size_of(record)
    if len(person.keypoints) != len(COCO_KEYPOINTS):
        raise SkipSample("keypoints_count", f"{record.key} has {len(person.keypoints)}, not {len(COCO_KEYPOINTS)}")
    present = [(x, y) for x, y, visibility in person.keypoints if visibility]
    if not present:
        raise SkipSample("keypoints_absent", record.key)
    if any(
        not (-EDGE_TOLERANCE <= value <= limit + EDGE_TOLERANCE)
        for point in present
        for value, limit in zip(point, size, strict=True)
    ):
        raise SkipSample("keypoint_outside", record.key)
    named = {"person": question_text(record).rstrip(".")} if record.question.strip() else {}
    return {"box": coordinates.box(checked_box(record, person), size)} | named, coordinates.keypoints(
        person.keypoints, size
    )


def write_groups(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    groups: dict[str, list[Box4]] = {}
    for region in reading_order(regions_of(record)):
        groups.setdefault(label_of(record, region), []).append(checked_box(record, region))
    return {}, "".join(coordinates.grounded(label, boxes, size_of(record)) for label, boxes in groups.items())


def write_relation(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    if len(record.regions) < 2:
        raise SkipSample("region_missing", f"{record.key} has {len(record.regions)} of subject and object")
    subject, other = (grounded_text(record, coordinates, region) for region in record.regions[:2])
    return {"subject": subject, "object": other}, answer_text(record)


def write_questions(record: Record, coordinates: Coordinates) -> tuple[dict[str, str], str]:
    return {"answer": answer} if (answer := answer_text(record)) else {}, question_text(record)
