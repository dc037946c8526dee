"""Coordinates as text, and back: no other module writes or reads coordinates.

Coordinates are fractions of the *padded square*: the image pasted in the middle of a square of its
longer side (the original's `padded_resize`). The whole project uses this grammar:

    point       [x,y]
    box         [x1,y1,x2,y2]                       corner (x1, y1) top left, (x2, y2) bottom right
    several     [x1,y1,x2,y2;x1,y1,x2,y2]
    grounded    <p>phrase</p>[x1,y1,x2,y2;...]
    keypoints   <p>nose</p>[x,y]<p>left shoulder</p>[x,y]...   COCO's order, without absent ones

Written numbers have exactly `decimals` decimals, without spaces. Reading is tolerant: it accepts
spaces, "1" or ".5", and text around the brackets. It moves a number up to `BEYOND` outside 0-1 to
the edge. It skips what is malformed: a wrong count of numbers, a number further out, a bracket that
generation cut off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from sphinx_pl.utils.errors import UserError

Box4 = tuple[float, float, float, float]
Point2 = tuple[float, float]
Size = tuple[int, int]

# fmt: off
COCO_KEYPOINTS = (
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle",
)
# fmt: on
"""Names of a person's 17 keypoints in the order of COCO's annotation files."""

BEYOND = 0.1
"""How far outside 0-1 a number may be and still mean the edge. Numbers further out are pixels or
thousandths."""

_NOTATION = re.compile(
    # Two numbers or more in brackets of any kind; a tag that names a place, with or without bars.
    r"[\[({<]\s*-?\d*\.?\d+\s*%?(?:\s*[,;:\s]\s*-?\d*\.?\d+\s*%?)+\s*[\])}>]"
    r"|<\|?/?(?:b?box|loc|point|poly|quad|coord|seg|bin|det|region|patch)[^<>]*>",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\s*-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)\s*")
_BRACKET = re.compile(r"\[([^\[\]]*)(\]?)")
_GROUNDED = re.compile(r"<p>((?:(?!</?p>).)*)</p>\s*\[([^\[\]]*)(\]?)", re.DOTALL)
_PLACE = re.compile(f"{_GROUNDED.pattern}|{_BRACKET.pattern}", re.DOTALL)


def padded_frame(size: Size) -> tuple[int, int, int]:
    """(side, dx, dy): the side of the padded square of an image (width, height), and the image's
    offset in it."""
    width, height = size
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def same_shape(a: Size, b: Size) -> bool:
    """Whether images of these sizes (width, height) have equal fractions in their padded squares.

    One may be the other in another resolution, with sides rounded to whole pixels. Then their
    shares of the longer side differ by less than a pixel of the smaller image. A pixel of a small
    image is large, so 0.02 is the limit.
    """
    sides = max(a), max(b)
    differences = (abs(one / sides[0] - other / sides[1]) for one, other in zip(a, b, strict=True))
    return a == b or max(differences) <= min(1 / min(sides), 0.02)


def holds_coordinates(text: str) -> bool:
    """Whether a text has boxes, points or polygons in this grammar or one that other projects use.

    For example `[20, 10, 60, 50]`, `<box>`, `(x1,y1),(x2,y2)`, `<loc0100>`, `<|box_start|>`,
    `{<12><40>}`.
    """
    return _NOTATION.search(text) is not None


def kept_views(size: Size, pixels: int, grid: int) -> tuple[bool, ...]:
    """Whether each view shows any of the image: the whole square, then grid x grid sub-images by
    rows.

    Args:
        size: of the image, before it is padded and resized to `pixels` a side.
    """
    side, dx, dy = padded_frame(size)
    reach = 2 * max(1.0, side / pixels)  # of bicubic resizing, which carries the image's edge into the padding
    spans = []
    for start, length in ((dx, size[0]), (dy, size[1])):
        edges = [(side * i / grid, side * (i + 1) / grid) for i in range(grid)]
        spans.append([low < start + length + reach and high > start - reach for low, high in edges])
    columns, rows = spans
    return (True, *(row and column for row in rows for column in columns))


def to_square(box_px: Box4, size: Size) -> Box4:
    """A box in pixels of the image -> fractions of its padded square, not rounded."""
    side, dx, dy = padded_frame(size)
    x1, y1, x2, y2 = box_px
    return (x1 + dx) / side, (y1 + dy) / side, (x2 + dx) / side, (y2 + dy) / side


def to_pixels(box: Box4, size: Size) -> Box4:
    """A box in fractions of the padded square -> pixels of the image; outside the image where it is
    in the padding."""
    side, dx, dy = padded_frame(size)
    x1, y1, x2, y2 = box
    return x1 * side - dx, y1 * side - dy, x2 * side - dx, y2 * side - dy


def point_to_pixels(point: Point2, size: Size) -> Point2:
    """The pixels of the image of a point in fractions of the padded square."""
    side, dx, dy = padded_frame(size)
    return point[0] * side - dx, point[1] * side - dy


def cut_at_edges(box: Box4, size: Size) -> Box4:
    """The part of a box in pixels that is inside an image (width, height)."""
    (x1, y1, x2, y2), (width, height) = box, size
    return min(max(x1, 0.0), width), min(max(y1, 0.0), height), max(min(x2, width), 0.0), max(min(y2, height), 0.0)


def iou(a: Box4, b: Box4) -> float:
    """The intersection over union of two boxes in the same frame; 0 if both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Grounded:
    """A phrase and its boxes or points, in fractions of the padded square."""

    phrase: str
    boxes: tuple[Box4, ...] = ()
    points: tuple[Point2, ...] = ()


@dataclass(frozen=True, slots=True)
class TextPart:
    """A part of a text, and the places that it names in fractions of the padded square.

    `numbers` is the bracket as it is written, "" if the part names no place. `phrase` is the phrase
    of the bracket, "" if the bracket stands alone.
    """

    text: str
    phrase: str = ""
    numbers: str = ""
    boxes: tuple[Box4, ...] = ()
    points: tuple[Point2, ...] = ()


@dataclass(frozen=True)
class Coordinates:
    """Writes pixels as text with `decimals` decimals, and reads text as fractions of the padded
    square.

    Text that this class writes stays the same if it is read, converted by `to_pixels` and written
    again, for any image size.
    """

    decimals: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.decimals <= 6:
            raise UserError(f"data.processor.decimals={self.decimals} must be 1 to 6")

    def box(self, box_px: Box4, size: Size) -> str:
        """`[x1,y1,x2,y2]` of a box in pixels of an image (width, height)."""
        return self.boxes([box_px], size)

    def boxes(self, boxes_px: Iterable[Sequence[float]], size: Size) -> str:
        """`[x1,y1,x2,y2;...]` of boxes in pixels, in the given order."""
        side, *offsets = padded_frame(size)
        written = (
            ",".join(self._fraction(value, offsets[axis % 2], side) for axis, value in enumerate(numbers))
            for numbers in boxes_px
        )
        return f"[{';'.join(written)}]"

    def point(self, point_px: Point2, size: Size) -> str:
        """`[x,y]` of a point in pixels."""
        return self.points([point_px], size)

    def points(self, points_px: Iterable[Point2], size: Size) -> str:
        """`[x,y;...]` of points in pixels, in the given order."""
        return self.boxes(points_px, size)  # both are lists of alternating x and y

    def grounded(self, phrase: str, boxes_px: Iterable[Sequence[float]], size: Size) -> str:
        """`<p>phrase</p>[...;...]` of boxes (or points) in pixels."""
        return f"<p>{phrase}</p>{self.boxes(boxes_px, size)}"

    def keypoints(self, keypoints_px: Sequence[tuple[float, float, int]], size: Size) -> str:
        """`<p>nose</p>[x,y]...` of (x, y, visibility) in pixels in COCO's order, without points of
        visibility 0."""
        return "".join(
            self.grounded(name, [(x, y)], size)
            for name, (x, y, visibility) in zip(COCO_KEYPOINTS, keypoints_px, strict=True)
            if visibility
        )

    def parse_boxes(self, text: str) -> list[Box4]:
        """All well-formed boxes of a text in order, with swapped corners corrected."""
        return [box for match in _BRACKET.finditer(text) for box in _elements(match[1], match[2])[0]]

    def parse_points(self, text: str) -> list[Point2]:
        """All well-formed points of a text in order."""
        return [point for match in _BRACKET.finditer(text) for point in _elements(match[1], match[2])[1]]

    def parse_grounded(self, text: str) -> list[Grounded]:
        """All phrases of a text that a well-formed box or point follows."""
        return [part for part in self.cut_grounded(text) if isinstance(part, Grounded)]

    def cut_grounded(self, text: str) -> list[str | Grounded]:
        """The text cut into the phrases that `parse_grounded` finds, and the text before, between
        and after them."""
        parts: list[str | Grounded] = []
        at = 0
        for match in _GROUNDED.finditer(text):
            boxes, points = _elements(match[2], match[3])
            if boxes or points:
                parts += [text[at : match.start()], Grounded(match[1].strip(), tuple(boxes), tuple(points))]
                at = match.end()
        return [part for part in (*parts, text[at:]) if part]

    def pieces(self, text: str) -> list[TextPart]:
        """The text cut where its places begin and end. The parts' `text` joined gives the text."""
        pieces = []
        at = 0
        for match in _PLACE.finditer(text):
            phrase, inside, closing = match[1] or "", match[2] or match[4] or "", match[3] or match[5] or ""
            boxes, points = _elements(inside, closing)
            if not boxes and not points:
                continue
            if match.start() > at:
                pieces.append(TextPart(text[at : match.start()]))
            pieces.append(TextPart(match[0], phrase.strip(), f"[{inside}{closing}", tuple(boxes), tuple(points)))
            at = match.end()
        return [*pieces, TextPart(text[at:])] if at < len(text) else pieces

    def _fraction(self, value: float, offset: int, side: int) -> str:
        # Decimal arithmetic on the printed number: half a unit rounds up on every machine, and the
        # last bit of a float that came from text never decides.
        exact = (Decimal(repr(float(value))) + offset) / side
        rounded = min(max(exact, Decimal(0)), Decimal(1)).quantize(Decimal(1).scaleb(-self.decimals), ROUND_HALF_UP)
        return f"{rounded:f}"


def _elements(inside: str, closing: str) -> tuple[list[Box4], list[Point2]]:
    """The boxes and points inside one bracket. Without a closing bracket the last element may be
    cut, so it is skipped."""
    boxes: list[Box4] = []
    points: list[Point2] = []
    elements = inside.split(";")
    for element in elements if closing else elements[:-1]:
        numbers = element.split(",")
        if len(numbers) not in (2, 4) or not all(_NUMBER.fullmatch(number) for number in numbers):
            continue
        values = [float(number) for number in numbers]
        if min(values) < -BEYOND or max(values) > 1 + BEYOND:
            continue
        values = [min(max(value, 0.0), 1.0) for value in values]
        if len(values) == 2:
            points.append((values[0], values[1]))
        else:
            (x1, x2), (y1, y2) = sorted(values[0::2]), sorted(values[1::2])
            boxes.append((x1, y1, x2, y2))
    return boxes, points
