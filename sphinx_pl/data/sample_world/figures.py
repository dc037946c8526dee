"""These are the pictures for OCR, pose and layout: numbers, stick figures and little pages."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from sphinx_pl.data.coordinates import COCO_KEYPOINTS
from sphinx_pl.data.sample_world.assets import Assets, Origin, photo_crop
from sphinx_pl.data.sample_world.drawing import (
    COLORS,
    INK,
    Array,
    Rgb,
    background,
    coverage,
    finished,
    jitter,
    paint,
    paint_object,
    text_mask,
)
from sphinx_pl.data.sample_world.scenes import DrawnPicture, picture_size, places
from sphinx_pl.data.schema import Region

SKIN: tuple[Rgb, ...] = ((236, 190, 160), (200, 142, 104), (140, 92, 66))
TROUSERS: Rgb = (56, 58, 84)
LINE_PITCH = 4  # pixels from one line of a paragraph to the next
BLOCK_GAP = 6


@dataclass(frozen=True)
class Annotated(DrawnPicture):
    """A picture with labelled regions."""

    regions: tuple[Region, ...]


def draw_numbers(rng: random.Random, domain: str, assets: Assets | None) -> Annotated:
    """Return a picture of one or two different numbers of one or two digits.

    Two numbers stand one below the other, so that their order is clear.
    """
    texts = [_number(rng)]
    if rng.random() < 0.25:
        texts.append(_number(rng))
        while texts[1] == texts[0]:
            texts[1] = _number(rng)
    while True:
        width, height = picture_size(rng)
        origin = Origin()
        lowest = 22 * max(width, height) // 64
        masks = [text_mask(text, rng.randint(min(28, lowest), 30), rng, assets, origin) for text in texts]
        boxes = places(masks, rng, width, height)
        if boxes and (len(boxes) == 1 or boxes[0][3] <= boxes[1][1]):
            break
    canvas = background(width, height, rng, assets, origin)
    color = rng.choice([INK, INK, COLORS["red"], COLORS["blue"], COLORS["purple"]])
    for mask, box in zip(masks, boxes, strict=True):
        paint_object(canvas, mask, box[0], box[1], color, rng, assets)
    regions = tuple(Region(box, text) for box, text in zip(boxes, texts, strict=True))
    return Annotated(finished(canvas, rng, assets is not None), width, height, domain, origin, regions)


def _number(rng: random.Random) -> str:
    return str(rng.randint(10, 99) if rng.random() < 0.4 else rng.randint(0, 9))


def draw_people(rng: random.Random, domain: str, assets: Assets | None, people: int) -> Annotated:
    """Return a picture of one or two stick figures that face the viewer.

    Their left is on the picture's right.
    """
    width, height = (64, 64) if people == 1 else (96, 64)
    origin = Origin()
    canvas = background(width, height, rng, assets, origin)
    regions: list[Region] = []
    for index in range(people):
        room = width / people
        bones = _bones(rng, room, height)
        shift = index * room
        shirt = COLORS[rng.choice(tuple(COLORS))]
        parts = _body(bones, shift, width, height)
        for part, color in zip(parts, (TROUSERS, shirt, shirt, rng.choice(SKIN)), strict=True):
            paint_object(canvas, part, 0, 0, color, rng, assets)
        covered = np.max(parts, axis=0) > 0.35
        rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        keypoints = tuple(
            (round(bones[name][0] + shift, 1), round(bones[name][1], 1), 2) if name in bones else (0.0, 0.0, 0)
            for name in COCO_KEYPOINTS
        )
        regions.append(Region(box, "person", keypoints))
    return Annotated(finished(canvas, rng, assets is not None), width, height, domain, origin, tuple(regions))


def _bones(rng: random.Random, room: float, height: int) -> dict[str, tuple[float, float]]:
    """Return the joint positions of a figure that fits into `room` x `height` pixels.

    Eyes and ears are too small to be drawn.
    """
    while True:
        tall = rng.uniform(44, 54)
        points = {"nose": (0.0, 0.12)}
        for side, sign in (("left", 1), ("right", -1)):
            shoulder, hip = (sign * 0.13, 0.26), (sign * 0.08, 0.55)
            arm, leg = rng.uniform(15, 110), rng.uniform(2, 28)
            elbow = _step(shoulder, sign * arm, 0.17)
            knee = _step(hip, sign * leg, 0.21)
            points |= {f"{side} shoulder": shoulder, f"{side} elbow": elbow, f"{side} hip": hip, f"{side} knee": knee}
            points[f"{side} wrist"] = _step(elbow, sign * (arm + rng.uniform(-15, 50)), 0.16)
            points[f"{side} ankle"] = _step(knee, sign * (leg - rng.uniform(0, 25)), 0.21)
        xs = [x * tall for x, _ in points.values()]
        ys = [y * tall for _, y in points.values()]
        left, right = 3 - min(xs), room - 3 - max(xs)
        top, bottom = max(1.0, 3 - min(ys)), height - 3 - max(ys)
        if left < right and top < bottom:
            dx, dy = rng.uniform(left, right), rng.uniform(top, bottom)
            return {name: (x * tall + dx, y * tall + dy) for name, (x, y) in points.items()}


def _step(start: tuple[float, float], degrees: float, length: float) -> tuple[float, float]:
    """Return the point `length` away from `start`. The direction of 0 degrees is straight down."""
    angle = math.radians(degrees)
    return start[0] + length * math.sin(angle), start[1] + length * math.cos(angle)


def _body(bones: dict[str, tuple[float, float]], shift: float, width: int, height: int) -> list[Array]:
    """Return masks [height, width] of legs, torso, arms and head."""
    scale = 4

    def at(name: str) -> tuple[float, float]:
        return (bones[name][0] + shift) * scale, bones[name][1] * scale

    images = [Image.new("L", (width * scale, height * scale)) for _ in range(4)]
    legs, torso, arms, head = (ImageDraw.Draw(image) for image in images)
    for side in ("left", "right"):
        legs.line([at(f"{side} {joint}") for joint in ("hip", "knee", "ankle")], 255, 3 * scale, "curve")
        arms.line([at(f"{side} {joint}") for joint in ("shoulder", "elbow", "wrist")], 255, 5 * scale // 2, "curve")
    corners = ("left shoulder", "right shoulder", "right hip", "left hip")
    torso.polygon([at(name) for name in corners], 255)
    x, y = at("nose")
    radius = (bones["left shoulder"][1] - bones["nose"][1]) * 0.75 * scale
    head.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    return [coverage(image.reduce(scale)) for image in images]


def draw_page(rng: random.Random, domain: str, assets: Assets | None) -> Annotated:
    """Return a page of two to four blocks from top to bottom.

    A title comes first on most pages. Paragraphs and figures follow.
    """
    width, height = rng.choice(((64, 80), (64, 88), (72, 96)))
    origin = Origin()
    canvas = _paper(rng, width, height, assets, origin)
    labels = ["title"] if rng.random() < 0.75 else []
    labels += [rng.choice(("paragraph", "figure")) for _ in range(rng.choice((1, 2, 2, 3) if labels else (2, 3)))]
    left, right = rng.randint(4, 8), width - rng.randint(4, 8)
    free = height - 10 - BLOCK_GAP * (len(labels) - 1)
    regions: list[Region] = []
    y = 5
    for index, label in enumerate(labels):
        share = free // (len(labels) - index)
        if label == "title":
            box = (left, y, right - rng.randint(0, 20), y + rng.randint(6, 8))
        elif label == "paragraph":
            lines = rng.randint(2, max(2, min(7, share // LINE_PITCH)))
            box = (left, y, right, y + LINE_PITCH * lines - 2)
        else:
            box = (
                left + rng.randint(0, 10),
                y,
                right - rng.randint(0, 10),
                y + min(30, max(10, share - rng.randint(0, 8))),
            )
        _block(canvas, label, box, rng, assets, origin)
        regions.append(Region(box, label))
        free -= box[3] - box[1]
        y = box[3] + BLOCK_GAP
    return Annotated(finished(canvas, rng, assets is not None), width, height, domain, origin, tuple(regions))


def _paper(rng: random.Random, width: int, height: int, assets: Assets | None, origin: Origin) -> Array:
    canvas = background(width, height, rng, assets, origin)
    if assets is not None:  # the sheet is bright, and the photograph stays faintly visible
        canvas = 0.25 * (canvas - canvas.mean()) + jitter((228, 222, 206), rng, 10)
    return np.asarray(canvas, dtype=np.float32)


def _block(
    canvas: Array, label: str, box: tuple[int, int, int, int], rng: random.Random, assets: Assets | None, origin: Origin
) -> None:
    x1, y1, x2, y2 = box
    if label == "title":
        canvas[y1:y2, x1:x2] = jitter(INK, rng)
    elif label == "paragraph":
        for y in range(y1, y2, LINE_PITCH):
            end = x2 if y + LINE_PITCH < y2 else x2 - rng.randint(0, (x2 - x1) // 2)
            canvas[y : y + 2, x1:end] = jitter((128, 128, 132), rng)
    elif assets is None:
        canvas[y1:y2, x1:x2] = jitter(COLORS[rng.choice(tuple(COLORS))], rng)
    else:
        tint = jitter(COLORS[rng.choice(tuple(COLORS))], rng)
        texture = photo_crop(assets, rng, x2 - x1, y2 - y1, Origin())
        paint(
            canvas,
            np.ones((y2 - y1, x2 - x1), dtype=np.float32),
            x1,
            y1,
            np.asarray(0.5 * tint + 0.5 * texture, dtype=np.float32),
        )
