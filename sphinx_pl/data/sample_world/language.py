"""This module writes all language of the sample world: captions, the text corpus and the chats.

Captions of the real domain are noisy as alt text is. Those of the synthetic domain come from clean
templates. The text corpus states small facts, and chats ask for them in other words. The chats of
the test ask only for facts that no training chat asks for.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from sphinx_pl.data.sample_world.drawing import COLORS, SHAPES
from sphinx_pl.data.sample_world.scenes import DIGITS, Scene

NUMBER_WORDS = ("zero", "one", "two", "three")
WRONG_SHARE = 0.15
PARTIAL_SHARE = 0.15


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def listing(items: list[str]) -> str:
    """Return `x`, `x and y` or `x, y and z`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def object_count(count: int) -> str:
    return f"{NUMBER_WORDS[count]} object{'s' if count > 1 else ''}"


RELATION_PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
RELATIONS = tuple(RELATION_PHRASES)


def relation(a: tuple[float, float], b: tuple[float, float], least: float = 12) -> str | None:
    """Return which of `RELATIONS` the point `a` is to `b`, or None if no direction clearly
    prevails.

    Args:
        least: the smallest distance in pixels that counts as a relation.
    """
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) >= max(2 * abs(dy), least):
        return "left" if dx < 0 else "right"
    if abs(dy) >= max(2 * abs(dx), least):
        return "above" if dy < 0 else "below"
    return None


def description(scene: Scene) -> str:
    """Return two sentences: how many objects there are, and which they are from left to right."""
    names = [with_article(thing.phrase) for thing in scene.things]
    if len(names) == 1:
        return f"There is one object in the picture. It is {names[0]}."
    return f"There are {object_count(len(names))} in the picture. From left to right, they are {listing(names)}."


def synthetic_caption(scene: Scene, rng: random.Random) -> str:
    """Return a clean caption that names every object, from left to right."""
    names = [with_article(thing.phrase) for thing in scene.things]
    if len(names) == 1:
        return rng.choice((names[0], f"there is one object: {names[0]}", f"a picture of {names[0]}"))
    if len(names) == 2 and (place := relation(scene.things[0].center, scene.things[1].center)) and rng.random() < 0.4:
        return f"{names[0]} {RELATION_PHRASES[place]} {names[1]}"
    if rng.random() < 0.4:
        return f"there are {object_count(len(names))}: {listing(names)}"
    return listing(names)


OFF_TOPIC = (
    "click here for a larger view",
    "free delivery on all orders",
    "sunset over the harbour",
    "best price online",
    "my holiday in june",
    "share this page with friends",
    "new post on the blog",
    "no image available",
)


def real_caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return alt text as found on web pages, and its fault: "none", "partial" or "wrong".

    A wrong caption is about something else, or about objects none of which is in the picture. A
    partial one lacks objects or colours.
    """
    things = list(scene.things)
    rng.shuffle(things)
    draw = rng.random()
    if draw < WRONG_SHARE:
        if rng.random() < 0.5:
            return rng.choice(OFF_TOPIC), "wrong"
        present = {thing.phrase for thing in things}
        others = [f"{color} {kind}" for color in COLORS for kind in (*SHAPES, *DIGITS)]
        phrases = rng.sample([phrase for phrase in others if phrase not in present], len(things))
        return _alt_text(phrases, rng), "wrong"
    if draw < WRONG_SHARE + PARTIAL_SHARE:
        if len(things) > 1 and rng.random() < 0.6:
            return _alt_text([thing.phrase for thing in things[: rng.randint(1, len(things) - 1)]], rng), "partial"
        return _alt_text([thing.kind for thing in things], rng), "partial"
    return _alt_text([thing.phrase for thing in things], rng), "none"


def _alt_text(phrases: list[str], rng: random.Random) -> str:
    phrases = [with_article(phrase) if rng.random() < 0.4 else phrase for phrase in phrases]
    text = rng.choice((" and ", ", ", " ")).join(phrases)
    text = rng.choice(("", "", "", "photo of ", f"IMG_{rng.randint(1000, 9999)} ", "my ")) + text
    text += rng.choice(("", "", "", "!!", " :)", ".jpg", " - photo"))
    if rng.random() < 0.15:
        text = rng.choice((str.upper, str.title))(text)
    return text


@dataclass(frozen=True)
class Fact:
    """A fact is what a chat can ask for, and the sentences that state it in the text corpus."""

    family: str
    question: str
    answer: str
    statements: tuple[str, ...]


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("high", "low"), ("light", "dark")),
    *(("wet", "dry"), ("full", "empty"), ("open", "closed"), ("early", "late"), ("hard", "soft"), ("long", "short")),
    *(("good", "bad"), ("rich", "poor"), ("loud", "quiet"), ("left", "right"), ("up", "down"), ("day", "night")),
)


def facts() -> list[Fact]:
    """Return all facts of the world.

    They are the order of numbers, days, months and letters, sums below 19, and opposites.
    """
    result = [fact for n in range(99) for fact in _order("number", str(n), str(n + 1))]
    for family, names in (("day", DAYS), ("month", MONTHS), ("letter", LETTERS)):
        for first, second in itertools.pairwise(names):
            result += _order(family, first, second)
    for a, b in itertools.product(range(10), repeat=2):
        total = str(a + b)
        sums = (f"{a} and {b} make {total}.", f"If you add {b} to {a} you get {total}.")
        result.append(Fact("sum", f"What is {a} plus {b}?", total, sums))
    for x, y in OPPOSITES:
        statements = (f"{x} and {y} are opposites.", f"If it is not {x}, it is {y}.", f"If it is not {y}, it is {x}.")
        result += [
            Fact("opposite", f"What is the opposite of {one}?", other, statements) for one, other in ((x, y), (y, x))
        ]
    return result


def _order(family: str, first: str, second: str) -> list[Fact]:
    statements = (
        f"{first} is followed by {second}.",
        f"{second} follows {first}.",
        f"{first} is just ahead of {second}.",
    )
    return [
        Fact(family, f"What comes after {first}?", second, statements),
        Fact(family, f"What comes before {second}?", first, statements),
    ]


def split_facts(rng: random.Random) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Return the facts that chats of training, validation and test ask for.

    They are 70, 5 and 25 % of each family.
    """
    families: dict[str, list[Fact]] = {}
    for fact in facts():
        families.setdefault(fact.family, []).append(fact)
    train: list[Fact] = []
    val: list[Fact] = []
    test: list[Fact] = []
    for members in families.values():
        rng.shuffle(members)
        held_out, validated = len(members) // 4, max(1, len(members) // 20)
        test += members[:held_out]
        val += members[held_out : held_out + validated]
        train += members[held_out + validated :]
    return train, val, test


NAMES = ("Anna", "Tom", "Lena", "Max", "Mia", "Sam")
THINGS = ("ball", "book", "cup", "hat", "kite", "box")


def document(rng: random.Random, all_facts: list[Fact]) -> str:
    """Return a text of at most 60 words.

    It has stated facts, counting, a list in order, a described scene or a little story.
    """
    draw = rng.random()
    if draw < 0.6:
        family = rng.choice(("number", "number", "number", "sum", "sum", "day", "month", "letter", "opposite"))
        group = rng.sample([fact for fact in all_facts if fact.family == family], rng.randint(3, 6))
        return " ".join(_capital(rng.choice(fact.statements)) for fact in group)
    if draw < 0.75:
        start, length = rng.randint(0, 90), rng.randint(4, 9)
        return f"Counting from {start}: " + ", ".join(str(start + step) for step in range(length)) + "."
    if draw < 0.8:
        names = rng.choice((DAYS, MONTHS, LETTERS))
        start, length = rng.randint(0, len(names) - 4), rng.randint(4, 8)
        return f"In order: {', '.join(names[start : start + length])}."
    if draw < 0.9:
        phrases = [f"{rng.choice(tuple(COLORS))} {rng.choice((*SHAPES, *DIGITS))}" for _ in range(rng.randint(2, 4))]
        first = f"Someone drew {listing([with_article(phrase) for phrase in phrases])}."
        return f"{first} The {phrases[0]} is on the left and the {phrases[-1]} is on the right."
    giver, taker = rng.sample(NAMES, 2)
    color, thing, day = rng.choice(tuple(COLORS)), rng.choice(THINGS), rng.choice(DAYS)
    return (
        f"{giver} has {with_article(f'{color} {thing}')}. On {day}, {giver} gives it to {taker}. "
        f"Now {taker} has the {color} {thing}."
    )


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
