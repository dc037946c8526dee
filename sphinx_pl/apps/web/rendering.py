"""Renders a conversation and the places that it names as HTML and SVG."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from sphinx_pl.apps.web.session import Session
from sphinx_pl.data.coordinates import COCO_KEYPOINTS, Coordinates, Grounded, Size, TextPart, point_to_pixels, to_pixels
from sphinx_pl.data.drawing import GIVEN, PALETTE, limbs


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
) -> str:
    """Return a question or an answer as HTML.

    Its phrases are linked to their places by the keys of their marks.
    """
    pieces = coordinates.pieces(text)
    marks = iter(find_marks(pieces, prefix, colour))
    parts = []
    for piece in pieces:
        if not piece.numbers:
            plain = piece.text
            if growing and piece is pieces[-1]:
                plain = re.sub(r"</?p?$", "", plain)
            # The phrase's bracket has not arrived yet, or is malformed.
            parts.append(html.escape(re.sub(r"</?p>", "", plain)))
            continue
        mark = next(marks)
        numbers = html.escape(piece.numbers)
        link = f'tabindex="0" data-mark="{mark.key}" style="--mark:{mark.colour}"'
        if piece.phrase:
            parts.append(f'<span class="phrase" {link}>{html.escape(piece.phrase)}</span>')
            parts.append(f'<span class="numbers">{numbers}</span>')
        else:
            parts.append(f'<span class="phrase numbers" {link}>{numbers}</span>')
    return "".join(parts)


def render_talk(coordinates: Coordinates, session: Session) -> str:
    """Return the conversation as HTML."""
    if not session.exchanges:
        hint = "Ask anything" if session.picture is None else "Ask about the image"
        return f'<div class="talk empty">{hint}, or start from one of the instructions below.</div>'
    parts = []
    for number, exchange in enumerate(session.exchanges):
        question = render_text(coordinates, exchange.question, f"q{number}-", GIVEN)
        answer = render_text(coordinates, exchange.answer, f"a{number}-", growing=exchange.growing)
        state = "answer growing" if exchange.growing else "answer"
        if not exchange.answer:
            answer = "" if exchange.growing else '<span class="none">no answer</span>'
        parts.append(f'<div class="question" data-turn="{number}">{question}</div>')
        parts.append(f'<div class="{state}" data-turn="{number}">{answer}</div>')
    return f'<div class="talk">{"".join(parts)}</div>'


def render_picture(coordinates: Coordinates, session: Session) -> str:
    """Return the picture as HTML and SVG, with the places of every turn over it.

    The page shows those of the last turn.
    """
    picture = session.picture
    if picture is None:
        return '<div class="drop"><b>Drop an image here</b><span>or click to choose one, or paste</span></div>'
    width, height = picture.size
    groups = []
    tags = []
    last = len(session.exchanges) - 1
    for number, exchange in enumerate(session.exchanges):
        shapes = []
        for text, prefix, colour in ((exchange.question, "q", GIVEN), (exchange.answer, "a", None)):
            marks = find_marks(coordinates.pieces(text), f"{prefix}{number}-", colour)
            shapes.append(_limbs_svg(marks, picture.size))
            shapes += [_mark_svg(mark, picture.size, exchange.masks.get(mark.key, ""), prefix) for mark in marks]
            tags += [_tag(mark, picture.size, number, number == last) for mark in marks]
        visible = " shown" if number == last else ""
        groups.append(f'<g class="turn{visible}" data-turn="{number}">{"".join(shapes)}</g>')
    title = html.escape(f"{picture.name}, {width} x {height} pixels")
    return (
        f'<figure class="picture" style="--ratio:{width / height:.5f}"><div class="frame" data-width="{width}" '
        f'data-height="{height}"><img src="{picture.source}" alt="{title}" draggable="false">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(groups)}</svg>{"".join(tags)}</div>'
        f"<figcaption>{title}. Drag on it to put a box into the question.</figcaption></figure>"
    )


def _corners(mark: Mark, size: Size) -> list[tuple[float, float, float, float]]:
    """Return the mark's boxes in pixels of the image, cut at its edges, without boxes that lie in
    the padding.
    """
    width, height = size
    boxes = []
    for box in mark.piece.boxes:
        x1, y1, x2, y2 = to_pixels(box, size)
        x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
        if x1 < x2 and y1 < y2:
            boxes.append((x1, y1, x2, y2))
    return boxes


def _mark_svg(mark: Mark, size: Size, mask: str, kind: str) -> str:
    width, height = size
    parts = [f'<image href="{mask}" x="0" y="0" width="{width}" height="{height}"/>'] if mask else []
    for x1, y1, x2, y2 in _corners(mark, size):
        shape = f'x="{x1:.2f}" y="{y1:.2f}" width="{x2 - x1:.2f}" height="{y2 - y1:.2f}"'
        parts.append(f'<rect class="rim" {shape}/><rect class="box" {shape}/>')
    for point in mark.piece.points:
        x, y = point_to_pixels(point, size)
        # A line without length but with round ends is a dot of the same size on any screen.
        shape = f'x1="{x:.2f}" y1="{y:.2f}" x2="{x:.2f}" y2="{y:.2f}"'
        parts.append(f'<line class="dot rim" {shape}/><line class="dot" {shape}/>')
    title = f"<title>{html.escape(mark.piece.phrase or mark.piece.numbers)}</title>"
    return f'<g class="mark {kind}" data-mark="{mark.key}" style="--mark:{mark.colour}">{title}{"".join(parts)}</g>'


def _limbs_svg(marks: list[Mark], size: Size) -> str:
    lines = []
    for colour in dict.fromkeys(mark.colour for mark in marks):
        items = [Grounded(m.piece.phrase, m.piece.boxes, m.piece.points) for m in marks if m.colour == colour]
        for limb in limbs(items):
            (x1, y1), (x2, y2) = (point_to_pixels(point, size) for point in limb)
            shape = f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
            lines.append(f'<line class="limb" style="--mark:{colour}" {shape}/>')
    return "".join(lines)


def _tag(mark: Mark, size: Size, number: int, visible: bool) -> str:
    """Return the phrase as a tag at the upper left corner of its first box.

    Keypoints only have a tooltip, to save space.
    """
    corners = _corners(mark, size)
    if not corners or not mark.piece.phrase:
        return ""
    left, top = 100 * corners[0][0] / size[0], 100 * corners[0][1] / size[1]
    below = " below" if top < 6 else ""
    return (
        f'<span class="tag{below}{" shown" if visible else ""}" data-turn="{number}" data-mark="{mark.key}" '
        f'style="--mark:{mark.colour};left:{left:.2f}%;top:{top:.2f}%">{html.escape(mark.piece.phrase)}</span>'
    )
