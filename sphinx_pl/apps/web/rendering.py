"""Renders a conversation and the places that it names as HTML and SVG."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sphinx_pl.apps.web.session import Session
from sphinx_pl.data.coordinates import COCO_KEYPOINTS, Coordinates, Grounded, Size, TextPart, point_to_pixels, to_pixels
from sphinx_pl.data.drawing import GIVEN, PALETTE, limbs
from sphinx_pl.utils.html import Templates

_TEMPLATES = Templates(Path(__file__).with_name("templates"), marked=False)
render = _TEMPLATES.render


@dataclass(frozen=True)
class Mark:
    """A piece of text that names places, with its key on the page and its colour."""

    key: str
    colour: str
    piece: TextPart


def find_marks(pieces: list[TextPart], prefix: str, colour: str | None = None) -> list[Mark]:
    """Return a mark for each piece that names places.

    The keypoints of a person share a colour, and so do repeated names of the same place.

    Args:
        colour: the colour of all marks; None takes the colours of the palette in turn.
    """
    marks: list[Mark] = []
    colours: dict[tuple[str, object], str] = {}
    turn = 0
    person: set[str] = set()
    for piece in pieces:
        if not piece.numbers:
            continue
        joint = piece.phrase in COCO_KEYPOINTS and bool(piece.points)
        thing = (piece.phrase, piece.boxes or piece.points)
        if not (joint and person and piece.phrase not in person) and thing not in colours:
            person, turn = set(), turn + 1
        if joint:
            person.add(piece.phrase)
        else:
            person = set()
        of_turn = colours.setdefault(thing, PALETTE[(turn - 1) % len(PALETTE)])
        marks.append(Mark(f"{prefix}{len(marks)}", colour or of_turn, piece))
    return marks


def render_text(
    coordinates: Coordinates, text: str, prefix: str, colour: str | None = None, growing: bool = False
) -> Markup:
    """A question or an answer as HTML, whose phrases have the keys of their marks."""
    pieces = coordinates.pieces(text)
    marks = iter(find_marks(pieces, prefix, colour))
    parts: list[Mark | str] = []
    for piece in pieces:
        if piece.numbers:
            parts.append(next(marks))
            continue
        plain = piece.text
        if growing and piece is pieces[-1]:
            plain = re.sub(r"</?p?$", "", plain)
        # The phrase's bracket has not arrived yet, or is malformed.
        parts.append(re.sub(r"</?p>", "", plain))
    return render("text.html", parts=parts)


def render_talk(coordinates: Coordinates, session: Session) -> Markup:
    """The conversation as HTML."""
    turns = [
        {
            "question": render_text(coordinates, exchange.question, f"q{number}-", GIVEN),
            "answer": render_text(coordinates, exchange.answer, f"a{number}-", growing=exchange.growing),
            "exchange": exchange,
        }
        for number, exchange in enumerate(session.exchanges)
    ]
    return render("talk.html", turns=turns, has_picture=session.picture is not None)


def render_picture(coordinates: Coordinates, session: Session) -> Markup:
    """The picture as HTML and SVG, with the places of every turn over it.

    The page shows those of the last turn.
    """
    picture = session.picture
    if picture is None:
        return render("picture.html", picture=None)
    turns = []
    for number, exchange in enumerate(session.exchanges):
        layers = []
        for text, prefix, colour in ((exchange.question, "q", GIVEN), (exchange.answer, "a", None)):
            marks = find_marks(coordinates.pieces(text), f"{prefix}{number}-", colour)
            shapes = [_shapes(mark, picture.size, exchange.masks.get(mark.key, "")) for mark in marks]
            layers.append({"kind": prefix, "limbs": _limbs(marks, picture.size), "shapes": shapes})
        turns.append(layers)
    return render("picture.html", picture=picture, turns=turns)


def _corners(mark: Mark, size: Size) -> list[tuple[float, float, float, float]]:
    """The mark's boxes in pixels of the image, cut at its edges, without those in the padding."""
    width, height = size
    boxes = []
    for box in mark.piece.boxes:
        x1, y1, x2, y2 = to_pixels(box, size)
        x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
        if x1 < x2 and y1 < y2:
            boxes.append((x1, y1, x2, y2))
    return boxes


def _shapes(mark: Mark, size: Size, mask: str) -> dict[str, Any]:
    """A mark's boxes and points in pixels of the image, its mask, and the place of its tag.

    The phrase is a tag at the upper left corner of the first box. Keypoints only have a tooltip, to
    save space.
    """
    corners = _corners(mark, size)
    points = [point_to_pixels(point, size) for point in mark.piece.points]
    tag = None
    if corners and mark.piece.phrase:
        left, top, *_ = corners[0]
        tag = (100 * left / size[0], 100 * top / size[1])
    return {"mark": mark, "mask": mask, "boxes": corners, "points": points, "tag": tag}


def _limbs(marks: list[Mark], size: Size) -> list[tuple[str, list[tuple[float, float]]]]:
    """The colour and the two ends of each line of a skeleton."""
    lines = []
    for colour in dict.fromkeys(mark.colour for mark in marks):
        items = [Grounded(m.piece.phrase, m.piece.boxes, m.piece.points) for m in marks if m.colour == colour]
        lines += [(colour, [point_to_pixels(point, size) for point in limb]) for limb in limbs(items)]
    return lines
