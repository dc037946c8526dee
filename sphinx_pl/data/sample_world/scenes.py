"""A scene has one to three coloured shapes and digits that do not overlap.

Both domains share the plan of a scene, but not its look.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from sphinx_pl.data.sample_world.assets import Assets, Origin
from sphinx_pl.data.sample_world.drawing import (
    COLORS,
    SHAPES,
    Array,
    background,
    finished,
    font_mask,
    paint_object,
    scan_mask,
    shape_mask,
)

DIGITS = tuple("0123456789")
MAX_OBJECTS = 3
MARGIN = 2  # pixels between two boxes

Box = tuple[int, int, int, int]
ScenePlan = list[tuple[str, str]]  # (colour, kind) of each object


def group_of(kind: str) -> str:
    """Return the class of a kind that detection asks for."""
    return "digits" if kind in DIGITS else f"{kind}s"


@dataclass(frozen=True)
class Thing:
    """One object has a colour, a kind ("circle", "3") and a tight box in pixels."""

    color: str
    kind: str
    box: Box

    @property
    def phrase(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def group(self) -> str:
        return group_of(self.kind)


@dataclass(frozen=True)
class DrawnPicture:
    """An encoded image and what is in it."""

    jpeg: bytes
    width: int
    height: int
    domain: str
    origin: Origin


@dataclass(frozen=True)
class Scene(DrawnPicture):
    """A picture of things, in order from left to right."""

    things: tuple[Thing, ...]


def picture_size(rng: random.Random) -> tuple[int, int]:
    """Return a picture's size, which is mostly 64 x 64.

    A quarter of the pictures have another form, with sides of 64 to 96 pixels.
    """
    if rng.random() < 0.75:
        return 64, 64
    sides = [64, rng.choice((72, 80, 88, 96))]
    rng.shuffle(sides)
    return sides[0], sides[1]


def draw_plan(rng: random.Random, count: int) -> ScenePlan:
    """Return `count` different (colour, kind) pairs, a third of them digits.

    Sometimes a colour or a kind is repeated.
    """
    plan: ScenePlan = []
    while len(plan) < count:
        color = rng.choice(tuple(COLORS))
        kind = rng.choice(DIGITS) if rng.random() < 1 / 3 else rng.choice(SHAPES)
        if plan and rng.random() < 0.3:
            color, kind = rng.choice(((plan[-1][0], kind), (color, plan[-1][1])))
        if (color, kind) not in plan:
            plan.append((color, kind))
    return plan


def draw_scene(
    rng: random.Random,
    domain: str,
    assets: Assets | None,
    count: int,
    wanted: Callable[[ScenePlan], bool] | None = None,
) -> Scene:
    """Return a scene of `count` objects whose plan is `wanted`.

    `assets` are the scans and photographs to draw with. The synthetic domain has None.
    """
    while True:
        plan = draw_plan(rng, count)
        if wanted is None or wanted(plan):
            break
    while True:
        width, height = picture_size(rng)
        origin = Origin()
        masks = [_mask(kind, rng, width, height, count, assets, origin) for _, kind in plan]
        boxes = places(masks, rng, width, height)
        if boxes is not None:
            break
    canvas = background(width, height, rng, assets, origin)
    for (color, _), mask, box in zip(plan, masks, boxes, strict=True):
        paint_object(canvas, mask, box[0], box[1], COLORS[color], rng, assets)
    things = sorted((Thing(*pair, box) for pair, box in zip(plan, boxes, strict=True)), key=lambda thing: thing.center)
    return Scene(finished(canvas, rng, assets is not None), width, height, domain, origin, tuple(things))


def _mask(
    kind: str, rng: random.Random, width: int, height: int, count: int, assets: Assets | None, origin: Origin
) -> Array:
    # The model sees the padded square at one size. So objects of larger pictures are drawn larger,
    # with 20 to 32 pixels.
    smallest = min(28, 20 * max(width, height) // 64)
    size = rng.randint(smallest, min(32, smallest + (8 if count < MAX_OBJECTS else 5)))
    if kind not in DIGITS:
        return shape_mask(kind, size, rng, assets is not None)
    if assets is None:
        return font_mask(kind, size)
    return scan_mask(kind, size, rng, assets, origin)


def places(masks: list[Array], rng: random.Random, width: int, height: int) -> list[Box] | None:
    """Return a random place for each mask, or None if no free place was found."""
    boxes: list[Box] = []
    for mask in masks:
        h, w = mask.shape
        for _ in range(40):
            x, y = rng.randint(1, width - w - 1), rng.randint(1, height - h - 1)
            box = (x, y, x + w, y + h)
            if all(_apart(box, other) for other in boxes):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _apart(a: Box, b: Box) -> bool:
    return a[2] + MARGIN <= b[0] or b[2] + MARGIN <= a[0] or a[3] + MARGIN <= b[1] or b[3] + MARGIN <= a[1]
