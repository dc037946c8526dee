"""Masks, paint and backgrounds make the difference between the two domains' pictures.

A mask is float [h, w] in 0-1, cropped to what it covers. A canvas is float [h, w, 3] in 0-255.
"""

from __future__ import annotations

import io
import math
import random
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sphinx_pl.data.sample_world.assets import Assets, Origin, photo_crop

Array = NDArray[np.float32]
Rgb = tuple[int, int, int]

REAL, SYNTHETIC = "real", "synthetic"
DOMAINS = (REAL, SYNTHETIC)

COLORS: dict[str, Rgb] = {
    "red": (214, 30, 38),
    "green": (30, 150, 52),
    "blue": (38, 78, 222),
    "yellow": (246, 220, 28),
    "purple": (142, 44, 176),
    "orange": (250, 130, 16),
}
INK: Rgb = (38, 36, 44)

_SUPERSAMPLE = 4
_POLYGONS = {
    "square": [(math.cos(a), math.sin(a)) for a in (math.pi * (0.25 + 0.5 * k) for k in range(4))],
    "triangle": [(math.cos(a), math.sin(a)) for a in (math.pi * (-0.5 + 2 / 3 * k) for k in range(3))],
    "star": [
        ((1.0 if k % 2 == 0 else 0.42) * math.cos(a), (1.0 if k % 2 == 0 else 0.42) * math.sin(a))
        for k, a in ((k, math.pi * (-0.5 + k / 5)) for k in range(10))
    ],
    "circle": [(math.cos(a), math.sin(a)) for a in (math.pi * k / 12 for k in range(24))],
}
SHAPES = ("circle", "square", "triangle", "star")


def numpy_rng(rng: random.Random) -> np.random.Generator:
    """Return a generator of arrays whose seed is the next 64 bits of `rng`."""
    return np.random.Generator(np.random.PCG64(rng.getrandbits(64)))


def jitter(color: Rgb, rng: random.Random, amount: int = 12) -> Array:
    """Return the colour with each channel moved by at most `amount`."""
    return np.array([min(255, max(0, c + rng.randint(-amount, amount))) for c in color], dtype=np.float32)


def coverage(image: Image.Image) -> Array:
    """Return a grey image [h, w] as a mask."""
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def trimmed(mask: Array, level: float = 0.35) -> Array:
    """Return the mask without the rows and columns at its border that stay below `level`."""
    covered = mask > level
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def shape_mask(kind: str, size: int, rng: random.Random, real: bool) -> Array:
    """Return a shape whose longer side is about `size` pixels.

    In the real domain a shaky hand draws it and turns it a little.
    """
    points = _POLYGONS[kind]
    if real:
        points = _shaky(points, rng)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    scale = (size * _SUPERSAMPLE - 1) / max(max(xs) - min(xs), max(ys) - min(ys))
    image = Image.new("L", (size * _SUPERSAMPLE, size * _SUPERSAMPLE))
    ImageDraw.Draw(image).polygon([((x - min(xs)) * scale, (y - min(ys)) * scale) for x, y in points], fill=255)
    return trimmed(coverage(image.reduce(_SUPERSAMPLE)))


def _shaky(points: list[tuple[float, float]], rng: random.Random) -> list[tuple[float, float]]:
    turn, stretch = rng.uniform(-0.16, 0.16), rng.uniform(0.88, 1.12)
    phases = [rng.uniform(0, 2 * math.pi) for _ in range(4)]
    cos, sin = math.cos(turn), math.sin(turn)
    drawn = []
    for index, start in enumerate(points):
        end = points[(index + 1) % len(points)]
        for t in (0.0, 0.25, 0.5, 0.75):
            x, y = start[0] + t * (end[0] - start[0]), start[1] + t * (end[1] - start[1])
            angle = math.atan2(y, x)
            wobble = 1 + 0.04 * math.sin(3 * angle + phases[0]) + 0.03 * math.sin(7 * angle + phases[1])
            x, y = x * wobble * stretch, y * (wobble + 0.03 * math.sin(5 * angle + phases[2]))
            drawn.append((cos * x - sin * y, sin * x + cos * y))
    return drawn


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # which Pillow's wheels have
    return font


@lru_cache(maxsize=512)
def font_mask(text: str, height: int) -> Array:
    """Return rendered digits, `height` pixels high."""
    font = _font(48)
    left, top, right, bottom = font.getbbox(text, stroke_width=2)
    image = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), text, font=font, fill=255, stroke_width=2, stroke_fill=255)
    whole = Image.fromarray((trimmed(coverage(image)) * 255).astype(np.uint8))
    width = max(4, round(whole.width * height / whole.height))
    return coverage(whole.resize((width, height), Image.Resampling.BOX))


def scan_mask(digit: str, height: int, rng: random.Random, assets: Assets, origin: Origin) -> Array:
    """Return a scanned digit, enlarged to `height` pixels and turned a little.

    Its index is recorded in `origin`.
    """
    index = rng.choice(assets.by_digit[digit])
    origin.scans.append(index)
    scan = Image.fromarray((np.pad(trimmed(assets.scans[index], 0.15), 1) * 255).astype(np.uint8))
    ratio = height / (scan.height - 1.5)
    enlarged = scan.resize((round(scan.width * ratio), round(scan.height * ratio)), Image.Resampling.BICUBIC)
    turned = enlarged.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR)
    return trimmed(np.clip((coverage(turned) - 0.22) * 2.4, 0, 1))


def text_mask(text: str, height: int, rng: random.Random, assets: Assets | None, origin: Origin) -> Array:
    """Return a number of one or more digits, rendered without `assets`, else made of scans."""
    if assets is None:
        return font_mask(text, height)
    masks = [scan_mask(digit, height, rng, assets, origin) for digit in text]
    rows = max(mask.shape[0] for mask in masks)
    columns: list[Array] = []
    for mask in masks:
        top = (rows - mask.shape[0]) // 2
        padded = np.pad(mask, ((top, rows - mask.shape[0] - top), (0, 2)))
        columns.append(padded)
    return trimmed(np.concatenate(columns, axis=1))


def background(width: int, height: int, rng: random.Random, assets: Assets | None, origin: Origin) -> Array:
    """Return a plain pale canvas without `assets`, else a photograph's crop.

    The crop has little contrast and colour.
    """
    if assets is None:
        return np.tile(np.array([rng.randint(222, 255) for _ in range(3)], dtype=np.float32), (height, width, 1))
    crop = photo_crop(assets, rng, width, height, origin)
    grey = crop.mean(axis=2, keepdims=True)
    muted = grey + 0.35 * (crop - grey)
    centred = muted - muted.mean(axis=(0, 1), keepdims=True) * 0.8 - float(muted.mean()) * 0.2
    spread = max(float(centred.std()), 1.0)
    contrast = min(0.5, rng.uniform(14, 24) / spread)
    return np.asarray(centred * contrast + rng.uniform(120, 205), dtype=np.float32)


def paint(canvas: Array, mask: Array, x: int, y: int, color: Array, opacity: float = 1.0) -> None:
    """Cover the canvas with `color` where the mask is.

    `color` is [3] or [h, w, 3]. The mask's top left corner lies at (x, y).
    """
    h, w = mask.shape
    part = canvas[y : y + h, x : x + w]
    part += (mask * opacity)[..., None] * (color - part)


def paint_by_hand(canvas: Array, mask: Array, x: int, y: int, color: Array, rng: random.Random, assets: Assets) -> None:
    """Paint with uneven pressure, the texture of a photograph and a darker rim. See `paint`."""
    h, w = mask.shape
    texture = photo_crop(assets, rng, w, h, Origin()).mean(axis=2)
    texture = (texture - texture.mean()) / max(float(texture.std()), 4.0)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-1, 1, w) * math.cos(angle) + np.linspace(-1, 1, h)[:, None] * math.sin(angle)
    shade = 1.0 + 0.10 * ramp + 0.06 * np.clip(texture, -2, 2)
    blurred = Image.fromarray((np.pad(mask, 2) * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(1.5))
    inside = coverage(blurred)[2:-2, 2:-2]
    shade = shade * (0.72 + 0.28 * np.clip(inside * 1.6 - 0.5, 0, 1))
    paint(canvas, mask, x, y, np.asarray(color * shade[..., None], dtype=np.float32), 0.95)


def paint_object(
    canvas: Array, mask: Array, x: int, y: int, color: Rgb, rng: random.Random, assets: Assets | None
) -> None:
    """Paint a shade of the colour, flat without `assets`, else by hand."""
    shade = jitter(color, rng)
    if assets is None:
        paint(canvas, mask, x, y, shade)
    else:
        paint_by_hand(canvas, mask, x, y, shade, rng, assets)


def finished(canvas: Array, rng: random.Random, real: bool) -> bytes:
    """Return the canvas as JPEG.

    In the real domain it has a camera's colour cast and noise, and the artefacts of strong
    compression.
    """
    quality, subsampling = 92, 0
    if real:
        arrays = numpy_rng(rng)
        canvas = canvas * arrays.uniform(0.94, 1.06, 3).astype(np.float32)
        canvas = canvas + arrays.normal(0, rng.uniform(2, 8), canvas.shape).astype(np.float32)
        quality, subsampling = rng.randint(60, 85), 2
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()
