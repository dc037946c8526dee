"""A task: it writes a question and an answer from a record, and reads an answer back."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from sphinx_pl.data.answer_parsing import normalise
from sphinx_pl.data.coordinates import (
    COCO_KEYPOINTS,
    Box4,
    Coordinates,
    Grounded,
    Size,
    cut_at_edges,
    point_to_pixels,
    to_pixels,
)
from sphinx_pl.data.schema import Record, Region, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.registry import Registry

_BRACKET = r"[\[({][^\[\](){}\n]*[\])}]"
for _ in range(2):  # so deep are brackets in brackets
    _BRACKET = rf"[\[({{](?:[^\[\](){{}}\n]|{_BRACKET})*[\])}}]"
_BRACKETS = rf"{_BRACKET}(?:[\s,;]*{_BRACKET})*"
_TAGGED = r"(?:<p>(?:(?!</?p>).)*</p>|<(\w{1,16})>[^<>]*</\1>)"
PARTS = re.compile(rf"{_TAGGED}(?:\s*{_BRACKETS})?|{_BRACKETS}|\w+(?:[.,:/'’-]\w+)*", re.DOTALL)
"""A part of an answer that is cut whole: a phrase with its places, places alone, a number, a word."""
LINES = re.compile(r"[^\n]+")
WHOLE = re.compile(r".+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed answer: the annotations of a record, as far as the text holds them.

    `answer` is as in a record, with a placeholder for each phrase that has boxes (they number the
    regions in the order of the text); of multiple choice it is the letter. `places` are labels with
    boxes or points in fractions of the padded square, since a text does not tell the image's size.
    `formed`: whether the text has the form asked for.
    """

    answer: str = ""
    places: tuple[Grounded, ...] = ()
    formed: bool = True

    @property
    def boxes(self) -> list[Box4]:
        """All boxes in order, in fractions of the padded square."""
        return [box for place in self.places for box in place.boxes]

    def regions(self, size: Size) -> tuple[Region, ...]:
        """A region for each box, in pixels of an image (width, height) and cut at its edges."""
        return tuple(
            Region(cut_at_edges(to_pixels(box, size), size), place.phrase)
            for place in self.places
            for box in place.boxes
        )

    def keypoints(self, size: Size) -> tuple[tuple[float, float, int], ...]:
        """COCO's 17 keypoints in pixels of an image (width, height), as in a `Region`. A repeated
        name counts once.

        Text does not tell hidden points from visible ones: named points have visibility 2, the
        others 0.
        """
        named = {normalise(place.phrase): place.points[0] for place in reversed(self.places) if place.points}
        return tuple(
            (*point_to_pixels(named[name], size), 2) if name in named else (0.0, 0.0, 0) for name in COCO_KEYPOINTS
        )


TurnWriter = Callable[[Record, Coordinates], tuple[dict[str, str], str]]
AnswerReader = Callable[[str, Coordinates], Parsed]


@dataclass(frozen=True)
class Task:
    """One kind of question. `scorer` names an entry of the metric registry, `max_new_tokens` bounds
    the answer.

    `parse` is the other direction of `write`: it takes any text, and never raises. `given` are the
    wordings in place of `templates` for records that fill the optional slot `given_slot`. `parts`
    finds what of an answer is whole or is not there at all, where an answer that is too long is
    cut.
    """

    name: str
    templates: tuple[str, ...]
    write: TurnWriter  # -> (values for the wording's slots, answer)
    parse: AnswerReader
    scorer: str
    max_new_tokens: int
    needs_image: bool = True
    given_slot: str = ""
    given: tuple[str, ...] = ()
    parts: re.Pattern[str] = PARTS

    def turns(self, record: Record, coordinates: Coordinates, rng: random.Random | None = None) -> tuple[Turn, ...]:
        """The conversation of a record: its own turns if it has them, else a turn written from its
        annotations.

        Args:
            rng: chooses the wording; None takes the first.

        Raises:
            SkipSample: the record lacks what the task needs, or its coordinates are impossible.
        """
        if self.needs_image and not record.images:
            raise SkipSample("image_absent", f"{record.key} has no image, its task {self.name} needs one")
        turns = record.turns or (self._write(record, coordinates, rng),)
        if any(not turn.answer.strip() for turn in turns):
            raise SkipSample("answer_empty", record.key)
        return turns

    def _write(self, record: Record, coordinates: Coordinates, rng: random.Random | None) -> Turn:
        slots, answer = self.write(record, coordinates)
        templates = self.given if self.given_slot in slots else self.templates
        template = rng.choice(templates) if rng else templates[0]
        return Turn(template.format(**slots), answer)


TASKS: Registry[Task] = Registry("task", "docs/data.md")


def add_task(
    name: str,
    write: TurnWriter,
    parse: AnswerReader,
    scorer: str,
    max_new_tokens: int,
    *templates: str,
    needs_image: bool = True,
    given_slot: str = "",
    given: tuple[str, ...] = (),
    parts: re.Pattern[str] = PARTS,
) -> None:
    task = Task(name, templates, write, parse, scorer, max_new_tokens, needs_image, given_slot, given, parts)
    TASKS.register(name, task)
