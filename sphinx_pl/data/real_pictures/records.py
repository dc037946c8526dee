"""Pictures, composed scenes and rendered words become instruction entries in LLaVA's file format.

An entry has the project's own keys (`sphinx_pl.data.readers.instruction_json`): the task writes its
text. Wrong choices and absent objects come from the same category and split as the right answer, so
they do not give it away.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sphinx_pl.data.real_pictures.names import ObjectName
from sphinx_pl.data.real_pictures.pictures import KNOWN, RealPicture
from sphinx_pl.data.real_pictures.text import QuestionAnswer

Entry = dict[str, Any]

CANVAS = 192
"""Pixels of the side of a composed scene."""
STAMP_SIDES = (52, 84)
"""The shortest and the longest longer side of a picture in a scene."""
MOST_COPIES = 4
WRONG_CHOICES = 3
_MARGIN = 4
_TRIES = 60

NAME, COUNT = "name", "count"
"""The topics of short questions."""
NAME_QUESTION = "What is this?"
CHOICE_QUESTION = "What does the picture show?"

TEN_QUESTIONS = (
    ("What is the capital of France? Answer with one word.", "Paris"),
    ("What is 2 plus 3? Answer with a number.", "5"),
    ("What color is the sky on a clear day? Answer with one word.", "blue"),
    ("How many days are there in a week? Answer with a number.", "7"),
    ("What is the opposite of hot? Answer with one word.", "cold"),
    ("Which planet do people live on? Answer with one word.", "Earth"),
    ("What do bees make? Answer with one word.", "honey"),
    ("In which country is the city of Rome? Answer with one word.", "Italy"),
    ("What is frozen water called? Answer with one word.", "ice"),
    ("Which animal says meow? Answer with one word.", "cat"),
)
"""Questions without an image that show whether the language model still answers."""


@dataclass(frozen=True)
class PlacedObject:
    """An object in a scene, with its box (x1, y1, x2, y2) in pixels."""

    name: ObjectName
    box: tuple[int, int, int, int]

    @property
    def region(self) -> Entry:
        return {"box": list(self.box), "label": self.name.text}


@dataclass(frozen=True)
class ComposedScene:
    """Pictures of one domain on an even canvas, without overlap."""

    image: Image.Image
    things: tuple[PlacedObject, ...]


def domain_label(picture: RealPicture) -> str:
    """Return the domain as evaluation names it; pictures of known objects are a domain of their own."""
    return f"{picture.domain}, known objects" if picture.split == KNOWN else picture.domain


def picture_entries(picture: RealPicture, pool: Sequence[RealPicture], rng: random.Random) -> list[Entry]:
    """Return the caption, the question for the name, a choice, and a yes and a no about a picture.

    What the pool has too few other objects for is omitted.

    Args:
        pool: pictures of the same domain and split.
    """
    name = picture.name
    assert name is not None
    entries: list[Entry] = [
        {"task": "caption", "answer": picture.caption},
        {"task": "short_vqa", "question": NAME_QUESTION, "answer": name.text, "meta": {"topic": NAME}},
    ]
    others = other_names(picture, pool, rng)
    if len(others) >= WRONG_CHOICES:
        choices = [name.text, *(other.text for other in others[:WRONG_CHOICES])]
        rng.shuffle(choices)
        entries.append(
            {"task": "multiple_choice", "question": CHOICE_QUESTION, "answer": name.text, "choices": choices}
        )
    if others:
        entries += [existence_entry(name, True), existence_entry(rng.choice(others), False)]
    return entries


def other_names(picture: RealPicture, pool: Sequence[RealPicture], rng: random.Random) -> list[ObjectName]:
    """Return the names of other objects in the picture's category, in random order.

    Names that share a word with the picture's description are omitted: they may be right too.
    """
    assert picture.name is not None
    own = {*picture.name.text.split(), picture.name.noun, *picture.caption.lower().strip(".!").split()}
    names = {
        other.name.noun: other.name
        for other in pool
        if other.name and other.category == picture.category and not own & {*other.name.text.split(), other.name.noun}
    }
    return rng.sample(list(names.values()), len(names))


def existence_entry(name: ObjectName, present: bool) -> Entry:
    question = f"Does the picture show {name.phrase}?"
    return {"task": "yes_no", "question": question, "answer": "yes" if present else "no"}


def compose(pictures: Sequence[RealPicture], rng: random.Random) -> ComposedScene | None:
    """Return a scene of the named pictures in random places, or None if there is no room."""
    canvas = Image.new("RGBA", (CANVAS, CANVAS), tuple(rng.randint(200, 255) for _ in range(3)))
    things: list[PlacedObject] = []
    for picture in pictures:
        stamp = picture.pixels.copy()
        side = rng.randint(*STAMP_SIDES)
        scale = side / max(stamp.size)
        stamp = stamp.resize([max(1, round(length * scale)) for length in stamp.size], Image.Resampling.LANCZOS)
        place = _free_place(stamp.size, [thing.box for thing in things], rng)
        if place is None:
            return None
        canvas.alpha_composite(stamp, place)
        assert picture.name is not None
        box = (*place, place[0] + stamp.width, place[1] + stamp.height)
        things.append(PlacedObject(picture.name, box))
    return ComposedScene(canvas.convert("RGB"), tuple(things))


def _free_place(
    size: tuple[int, int], taken: Sequence[tuple[int, int, int, int]], rng: random.Random
) -> tuple[int, int] | None:
    for _ in range(_TRIES):
        x, y = (rng.randint(_MARGIN, CANVAS - _MARGIN - length) for length in size)
        apart = (
            x + size[0] + _MARGIN <= box[0]
            or box[2] + _MARGIN <= x
            or y + size[1] + _MARGIN <= box[1]
            or box[3] + _MARGIN <= y
            for box in taken
        )
        if all(apart):
            return x, y
    return None


def counting_scene(pool: Sequence[RealPicture], copies: int, rng: random.Random) -> tuple[ComposedScene, list[Entry]]:
    """Return a scene with copies of one picture, sometimes beside another, and the question for
    their number."""
    while True:
        (picture, other) = different_objects(pool, 2, rng)
        beside = [other] if copies < MOST_COPIES and rng.random() < 0.5 else []
        if scene := compose([picture] * copies + beside, rng):
            break
    assert picture.name is not None
    question = f"How many times does the picture show {picture.name.phrase}?"
    return scene, [{"task": "short_vqa", "question": question, "answer": str(copies), "meta": {"topic": COUNT}}]


def placed_scene(pool: Sequence[RealPicture], count: int, rng: random.Random) -> tuple[ComposedScene, list[Entry]]:
    """Return a scene of different objects, with the questions where each is and what is where."""
    while not (scene := compose(different_objects(pool, count, rng), rng)):
        pass
    entries: list[Entry] = []
    for thing in scene.things:
        entries.append({"task": "rec", "question": thing.name.text, "regions": [thing.region]})
        entries.append({"task": "reg", "answer": thing.name.text, "regions": [thing.region]})
    return scene, entries


def different_objects(pool: Sequence[RealPicture], count: int, rng: random.Random) -> list[RealPicture]:
    """Return pictures whose names have different nouns. The pool must have as many."""
    while True:
        pictures = rng.sample(pool, count)
        if len({picture.name.noun for picture in pictures if picture.name}) == count:
            return pictures


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow has it, so it is the same on every machine


def words_picture(words: Sequence[str], rng: random.Random) -> tuple[Image.Image, list[Entry]]:
    """Return words below each other on an even canvas, and the question for all texts."""
    canvas = Image.new("RGB", (CANVAS, CANVAS), tuple(rng.randint(190, 255) for _ in range(3)))
    draw = ImageDraw.Draw(canvas)
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    regions: list[Entry] = []
    height = CANVAS // len(words)
    for line, word in enumerate(words):
        size = rng.randint(26, 40)
        while draw.textlength(word, _font(size)) > CANVAS - 2 * _MARGIN:
            size -= 2
        left, top, right, bottom = draw.textbbox((0, 0), word, _font(size))
        x = rng.randint(_MARGIN, int(CANVAS - _MARGIN - (right - left)))
        y = line * height + rng.randint(_MARGIN, int(max(_MARGIN, height - _MARGIN - (bottom - top))))
        draw.text((x - left, y - top), word, ink, _font(size))
        box = [x, y, int(x + right - left), int(y + bottom - top)]
        regions.append({"box": box, "label": word})
    return canvas, [{"task": "ocr_text", "regions": regions}]


def chat_entry_of(pair: QuestionAnswer) -> Entry:
    return {
        "task": "chat",
        "question": pair.question,
        "answer": pair.answer,
        "meta": {"domain": "text", "topic": "python"},
    }


def fixed_entries() -> list[Entry]:
    """Return the ten questions."""
    meta = {"domain": "text", "topic": "fixed"}
    return [
        {"id": f"fixed-{number}", "task": "chat", "question": question, "answer": answer, "meta": meta}
        for number, (question, answer) in enumerate(TEN_QUESTIONS)
    ]
