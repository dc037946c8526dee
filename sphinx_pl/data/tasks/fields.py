"""The fields of a record, checked before a task writes them as text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

from sphinx_pl.data.coordinates import BEYOND, Box4, Coordinates, Size, cut_at_edges
from sphinx_pl.data.schema import PLACEHOLDER, Record, Region
from sphinx_pl.data.skip import SkipSample

EDGE_TOLERANCE = 1.0
"""Pixels by which a box may pass the image's edge: annotation tools disagree on whether the last
pixel is inside."""
_MENTION = re.compile(r"\{([0-9]{1,4}(?:, ?[0-9]{1,4})*)\}")


def choice_letter(record: Record) -> str:
    """The letter ("A", "B", ...) of a record's answer among its choices.

    Raises:
        SkipSample: the answer is not one of the choices, one of these is blank or repeated, or
            there are more than 26.
    """
    if not 2 <= len(record.choices) <= len(string.ascii_uppercase):
        raise SkipSample("choices_count", f"{record.key} has {len(record.choices)} choices")
    if not all(choice.strip() for choice in record.choices):
        raise SkipSample("choice_empty", f"{record.key}: {record.choices}")
    if repeated := repeated_choice(record.choices):
        raise SkipSample("choices_repeated", f"{record.key}: {repeated}")
    if record.answer not in record.choices:
        raise SkipSample("answer_not_in_choices", record.key)
    return string.ascii_uppercase[record.choices.index(record.answer)]


def repeated_choice(choices: Iterable[str]) -> str:
    """The choice that is repeated but for white space; "" if none is."""
    ((choice, count),) = Counter(" ".join(choice.split()) for choice in choices).most_common(1)
    return choice if count > 1 else ""


def reading_order(regions: Iterable[Region]) -> list[Region]:
    """The regions line by line from the top, each line from the left.

    A region is on the line that an earlier (higher) one opened if its vertical middle is above that
    one's lower edge.
    """
    ordered: list[Region] = []
    line: list[Region] = []
    for region in sorted(regions, key=lambda region: (region.box[1], region.box[0])):
        if line and (region.box[1] + region.box[3]) / 2 >= line[0].box[3]:
            ordered += sorted(line, key=lambda region: region.box[0])
            line = []
        line.append(region)
    return ordered + sorted(line, key=lambda region: region.box[0])


def size_of(record: Record) -> Size:
    if not record.sizes:
        raise SkipSample("size_unknown", f"{record.key} has coordinates but its image has no width and height")
    _check_unit(record)
    return record.sizes[0]


def _check_unit(record: Record) -> None:
    """Raises: SkipSample: all boxes or all keypoints lie within one pixel, so they are fractions of
    the image."""
    if record.sizes and max(record.sizes[0]) == 1:
        return
    boxes = [region.box for region in record.regions]
    points = [point[:2] for region in record.regions for point in region.keypoints if point[2]]
    for name, places in (("box", boxes), ("keypoint", points)):
        if places and all(-BEYOND <= number <= 1 + BEYOND for place in places for number in place):
            raise SkipSample(
                f"{name}_below_pixel", f"{record.key}: {places[0]} must be in pixels of the image, not in fractions"
            )


def checked_box(record: Record, region: Region) -> Box4:
    """The box of a region, cut at the image's edges."""
    width, height = size_of(record)
    x1, y1, x2, y2 = region.box
    if not (x1 < x2 and y1 < y2):  # also true of NaN
        raise SkipSample("box_inverted", f"{record.key}: {region.box}")
    if min(x1, y1) < -EDGE_TOLERANCE or x2 > width + EDGE_TOLERANCE or y2 > height + EDGE_TOLERANCE:
        raise SkipSample("box_outside", f"{record.key}: {region.box} in {width}x{height}")
    x1, y1, x2, y2 = cut = cut_at_edges(region.box, (width, height))
    if not (x1 < x2 and y1 < y2):
        raise SkipSample("box_outside", f"{record.key}: {region.box} in {width}x{height}")
    return cut


def regions_of(record: Record) -> tuple[Region, ...]:
    if not record.regions:
        raise SkipSample("region_missing", record.key)
    _check_unit(record)
    return record.regions


def label_of(record: Record, region: Region) -> str:
    label = region.label.strip()
    if not label:
        raise SkipSample("label_empty", record.key)
    if any(mark in label for mark in ("<p>", "</p>", PLACEHOLDER)):
        raise SkipSample("label_markup", f"{record.key}: {label}")
    return label


def question_text(record: Record) -> str:
    question = record.question.strip()
    if not question:
        raise SkipSample("question_empty", record.key)
    return question


def answer_text(record: Record) -> str:
    return record.answer.strip()  # an empty one is refused by Task.turns, for every task


def grounded_text(record: Record, coordinates: Coordinates, *regions: Region) -> str:
    """The first region's label with the boxes of all."""
    boxes = [checked_box(record, region) for region in regions]
    return coordinates.grounded(label_of(record, regions[0]), boxes, size_of(record))


def grounded_answer(record: Record, coordinates: Coordinates) -> str:
    """The record's answer with its placeholders filled."""

    def phrase(match: re.Match[str]) -> str:
        indices = [int(index) for index in match[1].split(",")]
        if max(indices) >= len(record.regions):
            raise SkipSample("region_missing", f"{record.key} mentions region {max(indices)} of {len(record.regions)}")
        return grounded_text(record, coordinates, *(record.regions[index] for index in indices))

    answer, mentioned = _MENTION.subn(phrase, answer_text(record))
    if answer and not mentioned:
        raise SkipSample("region_missing", f"{record.key} mentions no region")
    return answer
