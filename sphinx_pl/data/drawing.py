"""Boxes and keypoints of an answer's text, drawn on the padded square image that the model sees."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw
from torch import Tensor

from sphinx_pl.data.coordinates import Coordinates, Grounded, Point2

TRUE = "#00a878"
PREDICTED = "#e6007e"
GIVEN = "#2f6fed"
"""Colours of the true answer, of the model's answer, and of what the question itself gives."""

# fmt: off
SKELETON = (
    ("nose", "left eye"), ("nose", "right eye"), ("left eye", "left ear"), ("right eye", "right ear"),
    ("left shoulder", "right shoulder"), ("left shoulder", "left elbow"), ("left elbow", "left wrist"),
    ("right shoulder", "right elbow"), ("right elbow", "right wrist"), ("left shoulder", "left hip"),
    ("right shoulder", "right hip"), ("left hip", "right hip"), ("left hip", "left knee"), ("left knee", "left ankle"),
    ("right hip", "right knee"), ("right knee", "right ankle"),
)
# fmt: on
"""Pairs of COCO's keypoints that a limb joins."""


PALETTE = ("#e6007e", "#2f6fed", "#00a878", "#f07800", "#8a3ffc", "#0098c7", "#c21e1e", "#7a8b00")
"""Colours of one answer's places, in turn; each is readable under white text and on white."""


def people(items: Iterable[Grounded]) -> list[dict[str, Point2]]:
    """Named points as one mapping for each person. A name that is repeated begins the next person."""
    groups: list[dict[str, Point2]] = [{}]
    for item in items:
        if item.points:
            if item.phrase in groups[-1]:
                groups.append({})
            groups[-1][item.phrase] = item.points[0]
    return [person for person in groups if person]


def limbs(items: Iterable[Grounded]) -> list[tuple[Point2, Point2]]:
    """The limbs between the keypoints of each person, in the points' own frame."""
    return [(person[a], person[b]) for person in people(items) for a, b in SKELETON if a in person and b in person]


def to_picture(pixels: Tensor, scale: int = 1) -> Image.Image:
    """A uint8 image [3, S, S] as an RGB picture whose pixels are squares of scale pixels a side."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def draw(
    picture: Image.Image, answer: str, prediction: str, coordinates: Coordinates, question: str = ""
) -> Image.Image:
    """A copy of a square picture with the places that the three texts name: given below true below
    predicted.

    Text without well-formed boxes or points draws nothing. Labels are not drawn: the text beside
    the picture has them.
    """
    picture = picture.convert("RGB")
    canvas = ImageDraw.Draw(picture)
    stroke = max(1, round(picture.width / 128))
    for text, colour in ((question, GIVEN), (answer, TRUE), (prediction, PREDICTED)):
        _draw_text(canvas, text, colour, coordinates, picture.width, stroke)
    return picture


def _draw_text(
    canvas: ImageDraw.ImageDraw, text: str, colour: str, coordinates: Coordinates, side: int, stroke: int
) -> None:
    # A white rim keeps every colour visible on every ground.
    for box in coordinates.parse_boxes(text):
        x1, y1, x2, y2 = (round(value * (side - 1)) for value in box)
        rim = (max(x1 - 1, 0), max(y1 - 1, 0), min(x2 + 1, side - 1), min(y2 + 1, side - 1))
        canvas.rectangle(rim, outline="white", width=stroke + 2)
        canvas.rectangle((x1, y1, x2, y2), outline=colour, width=stroke)
    for limb in limbs(coordinates.parse_grounded(text)):
        canvas.line([(x * side, y * side) for x, y in limb], fill=colour, width=stroke)
    for x, y in coordinates.parse_points(text):
        radius = 1.5 * stroke
        canvas.circle((x * side, y * side), radius + 1, fill="white")
        canvas.circle((x * side, y * side), radius, fill=colour)
