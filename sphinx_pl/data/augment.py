"""Random flips and crops of a record: its annotations are changed here, its pixels when they are
decoded.

Nothing is augmented unless the configuration asks for it. The text of a record must stay true, so
most records are refused (see `augment`). A refused record is returned unchanged.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sphinx_pl.data.coordinates import COCO_KEYPOINTS, Box4, Coordinates, Size, holds_coordinates
from sphinx_pl.data.schema import Record, Region
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.config import within
from sphinx_pl.utils.errors import UserError

CROP_ATTEMPTS = 10
"""Crops that are tried for one record before it is left whole."""

TEXT_TASKS = frozenset({"ocr", "ocr_text", "layout"})
"""Tasks about text in the picture, which must not be mirrored or cut in half."""

# The order of regions has no meaning there, and what is not visible need not be named.
_MAY_LOSE_REGIONS = frozenset({"detection", "detection_all"})

# Tasks whose answers are the places themselves. They ask nothing else about the image.
_GEOMETRY_TASKS = (
    *("rec", "reg", "pose", "detection", "detection_all"),
    *("grounded_caption", "grounded_vqa", "relation_detection"),
)

# Also "leftmost", "right-hand", "r." and "lft" of referring phrases. Too many matches only cost
# augmentation.
_SIDES = re.compile(
    r"\b(?:left|right|lft|rt|[lr]\b|(?:counter|anti)?-?clockwise|east|west|mirror|revers|backward)", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"\{[0-9]{1,4}(?:, ?[0-9]{1,4})*\}")
_DIGIT = re.compile(r"\d")
# Signs that a text quotes writing, which a mirror spoils: capitals, quotation marks, digits, words
# about writing.
_WRITING = re.compile(
    r"[\"“”‘’0-9]|\b[A-Z]{2,}\b|\b(?i:say(?:s|ing)?|read(?:s|ing)|writ(?:e|es|ing|ten)|words?|letters?|letter(?:ed|ing)|texts?|"
    r"numbers?|numbered|signs?|logos?|labels?|labeled|clocks?|jerseys?|banners?|posters?|plates?)\b"
)
# Words that a crop can make false even if it loses nothing that is named: places in the picture,
# ranks and counts.
_PLACES = re.compile(
    r"\b(?:top|bottom|upper|lower|centre|center|middle|corners?|edges?|sides?|borders?|background|foreground|first|"
    r"second|third|fourth|fifth|last|(?:[0-9]+(?:st|nd|rd|th))|many|number|count|total|only|all|both|"
    r"every|none|\w+most|ends?|far|nearest|closest|rows?|columns?|cut|half|partial(?:ly)?|part|off|frame|whole|"
    r"entire)\b",
    re.IGNORECASE,
)
# Coordinates that are spelt out.
_POSITIONS = re.compile(
    r"\b(?:bbox|bounding|coordinates?|pixels?|per ?cent|degrees?|(?:x|y)-?axis|diagonal\w*|o'?clock)\b", re.IGNORECASE
)
_READER = Coordinates()
_SWAPPED = [
    COCO_KEYPOINTS.index(re.sub("left|right", lambda side: {"left": "right", "right": "left"}[side[0]], name))
    for name in COCO_KEYPOINTS
]


@dataclass
class AugmentConfig:
    """The section `data.augment`: how often records are flipped and cropped, and which. By default
    none is.

    Args:
        flip: probability that a record is mirrored left to right.
        crop: probability that a record is cropped.
        min_area: smallest share of the image's area that a crop keeps.
        max_cut: largest share of a region's area that a crop may cut off.
        flip_tasks: tasks whose records may be flipped. Captions and free questions are not among
            them by default, since they may quote writing in the picture. ocr, ocr_text and layout
            are not allowed.
        crop_tasks: tasks whose records may be cropped; by default those whose regions tell what has
            to stay.

    Raises:
        UserError: a value is out of bounds.
    """

    flip: float = within(0.0, at_least=0, at_most=1)
    crop: float = within(0.0, at_least=0, at_most=1)
    min_area: float = within(0.5, above=0, at_most=1)
    max_cut: float = within(0.3, at_least=0, below=1)
    flip_tasks: list[str] = field(default_factory=lambda: list(_GEOMETRY_TASKS))
    crop_tasks: list[str] = field(default_factory=lambda: [*_GEOMETRY_TASKS, *sorted(TEXT_TASKS)])

    def __post_init__(self) -> None:
        for task in (*self.flip_tasks, *self.crop_tasks):
            TASKS[task]  # an unknown one is refused there
        if mirrored := TEXT_TASKS.intersection(self.flip_tasks):
            raise UserError(f"data.augment.flip_tasks: {', '.join(sorted(mirrored))} would show mirrored text")


def augment(record: Record, config: AugmentConfig, rng: random.Random | None) -> Record:
    """The record with its image flipped and cropped at random, and its regions and keypoints moved
    with the pixels.

    The image's reference holds the operations (`ImageRef.crop`, `ImageRef.flip`), and `sizes`
    become the crop's. Regions are cut at the crop's edges. Keypoints outside the crop become
    absent. A record stays as it is if

    - its task refuses it, so that it is counted for the right reason;
    - it does not have exactly one image, or the image is cropped or flipped already;
    - it has regions and its size is unknown, since no header is read for this. A crop always needs
      the size;
    - its text may hold coordinates in any notation: any digit may be one. Text that is only read
      out of the picture (labels of `TEXT_TASKS`) may have digits, but no box or point;
    - it would be flipped, and its text names left or right, quotes writing in the picture, or has
      letters beyond ASCII;
    - it would be cropped, and its text names places in the picture, ranks or counts, or a region
      would be lost. Only detection and detection_all may lose regions of which the crop shows
      nothing, as long as one stays. A person keeps a keypoint, and no text that is read is cut.

    Args:
        rng: None leaves the record as it is. Nothing is drawn if the probabilities are 0.
    """
    return augment_together([record], config, rng)[0]


def augment_together(
    records: Sequence[Record], config: AugmentConfig, rng: random.Random | None, counts: Counter[str] | None = None
) -> list[Record]:
    """Records about one image, augmented in one way that suits them all, so that they still share
    the image.

    Otherwise each record is treated as in `augment`.

    Args:
        counts: `not_augmented/coordinates_in_text` counts records that were chosen but have
            coordinates in their text.
    """
    changed = list(records)
    crops = rng is not None and config.crop > 0 and rng.random() < config.crop
    flips = rng is not None and config.flip > 0 and rng.random() < config.flip
    if rng is None or not (crops or flips) or len({(record.images, record.sizes) for record in changed}) != 1:
        return changed
    if any(_may_hold_coordinates(record) for record in changed):
        if counts is not None:
            counts["not_augmented/coordinates_in_text"] += len(changed)
        return changed
    if not all(_can_be_moved(record) for record in changed):
        return changed
    if crops and all(_can_be_cropped(record, config) for record in changed):
        changed = _random_crop(changed, config, rng)
    if flips and all(_can_be_flipped(record, config) for record in changed):
        changed = [_flipped(record) for record in changed]
    return changed


def _texts(record: Record) -> Iterable[str]:
    """All texts of a record, without what its task's wording adds."""
    yield from _words(record)
    yield from (region.label for region in record.regions)


def _words(record: Record) -> Iterable[str]:
    """All texts of a record but the labels of regions."""
    yield from (record.question, _PLACEHOLDER.sub("", record.answer), *record.choices)
    yield from (text for turn in record.turns for text in (turn.question, turn.answer))


def _may_hold_coordinates(record: Record) -> bool:
    if any(holds_coordinates(text) for text in _texts(record)):
        return True
    # The notations that data sets have cannot be listed, but all of them have digits.
    return any(_DIGIT.search(text) for text in (_words if record.task in TEXT_TASKS else _texts)(record))


def _finds_places(record: Record) -> bool | None:
    """Whether the record's answer holds boxes; None if its task refuses the record."""
    task = TASKS[record.task]
    try:
        return bool(task.parse(task.turns(record, _READER)[-1].answer, _READER).boxes)
    except SkipSample:
        return None


def _can_be_moved(record: Record) -> bool:
    if len(record.images) != 1 or record.images[0].crop is not None or record.images[0].flip:
        return False
    if record.regions and not record.sizes:
        return False
    if any(len(region.keypoints) not in (0, len(COCO_KEYPOINTS)) for region in record.regions):
        return False
    return _finds_places(record) is not None


def _can_be_flipped(record: Record, config: AugmentConfig) -> bool:
    if record.task not in config.flip_tasks:
        return False
    return not any(
        not text.isascii() or _SIDES.search(text) or _WRITING.search(text) or _POSITIONS.search(text)
        for text in _texts(record)
    )


def _can_be_cropped(record: Record, config: AugmentConfig) -> bool:
    if record.task not in config.crop_tasks or not record.sizes:
        return False
    if record.task in TEXT_TASKS:
        return True  # its words are the picture's, not about it
    return not any(_SIDES.search(text) or _PLACES.search(text) or _POSITIONS.search(text) for text in _texts(record))


def _flipped(record: Record) -> Record:
    images = (dataclasses.replace(record.images[0], flip=True),)
    if not record.regions:
        return dataclasses.replace(record, images=images)
    width = record.sizes[0][0]
    regions = []
    for region in record.regions:
        x1, y1, x2, y2 = region.box
        points = [(width - x, y, v) if v else (x, y, v) for x, y, v in region.keypoints]
        keypoints = tuple(points[swapped] for swapped in _SWAPPED) if points else ()
        regions.append(Region((width - x2, y1, width - x1, y2), region.label, keypoints))
    return dataclasses.replace(record, images=images, regions=tuple(regions))


def _random_crop(records: list[Record], config: AugmentConfig, rng: random.Random) -> list[Record]:
    """The records cut to the first random crop that suits all of them; unchanged if none does."""
    for _ in range(CROP_ATTEMPTS):
        crop = _draw_crop(records[0].sizes[0], config.min_area, rng)
        cut = [_cropped(record, crop, config.max_cut) for record in records]
        if None not in cut:
            return [record for record in cut if record is not None]
    return records


def _draw_crop(size: Size, min_area: float, rng: random.Random) -> tuple[int, int, int, int]:
    """A random crop of at least `min_area` of the area, in any form. No side is shorter than that
    share of its length."""
    area = rng.uniform(min_area, 1.0)
    across = area ** rng.random()
    # Rounded up: at least the area, and at least a pixel.
    width, height = (
        min(-int(-side * share // 1), side) for side, share in zip(size, (across, area / across), strict=True)
    )
    x, y = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
    return x, y, x + width, y + height


def _cropped(record: Record, crop: tuple[int, int, int, int], max_cut: float) -> Record | None:
    """The record cut to the crop; None if it would lose what it must keep."""
    max_cut = 0.0 if record.task in TEXT_TASKS else max_cut
    regions = record.regions
    if record.task in _MAY_LOSE_REGIONS:  # what is still seen in part has to be named
        regions = tuple(region for region in regions if _overlap(region.box, crop))
    kept = [_cut(region, crop, max_cut, record.sizes[0]) for region in regions]
    x1, y1, x2, y2 = crop
    images = (dataclasses.replace(record.images[0], crop=crop, annotated=record.sizes[0]),)
    rest = tuple(region for region in kept if region is not None)
    if len(rest) < len(kept):
        return None
    cropped = dataclasses.replace(record, images=images, sizes=((x2 - x1, y2 - y1),), regions=rest)
    # An answer with places must not become "None", and a refused record must stay refused.
    return cropped if _finds_places(cropped) == _finds_places(record) else None


def _cut(region: Region, crop: Box4, max_cut: float, size: Size) -> Region | None:
    """The part of a region inside the crop, in the crop's pixels; None if more than `max_cut` of
    its area is outside."""
    whole = _overlap(region.box, (0, 0, *size))  # what annotations have outside the image is nobody's loss
    left = _overlap(region.box, crop)
    if not whole or not left or _area(left) < (1 - max_cut) * _area(whole):
        return None
    dx, dy = crop[:2]
    x1, y1, x2, y2 = left
    keypoints = tuple(
        (x - dx, y - dy, v) if v and crop[0] <= x <= crop[2] and crop[1] <= y <= crop[3] else (0.0, 0.0, 0)
        for x, y, v in region.keypoints
    )
    return Region((x1 - dx, y1 - dy, x2 - dx, y2 - dy), region.label, keypoints)


def _overlap(a: Box4, b: Box4) -> Box4 | None:
    x1, y1, x2, y2 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _area(box: Box4) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
