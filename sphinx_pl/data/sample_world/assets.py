"""What the "real" domain is made of: scanned digits and photographs, split before any picture is
made.

Scans: the 1797 handwritten digits (8x8) of the UCI optical recognition set that scikit-learn ships.
Photographs: those that scikit-image's wheel contains; none is downloaded. A scan belongs to the
held-out split when its index is a multiple of five, a photograph when `HELD_OUT_PHOTOS` names it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TRAIN_PHOTOS = (
    "astronaut",
    "brick",
    "coffee",
    "coins",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "rocket",
)
HELD_OUT_PHOTOS = ("camera", "chelsea", "grass", "moon")

SHORT_SIDE = 240  # photographs are kept at this size: a crop of a whole picture's size then shows some of its content


@dataclass(frozen=True)
class Assets:
    """One split's photographs (RGB), its scans by index in the full set (mask [8, 8] in 0-1), and
    indices by digit."""

    photos: dict[str, Image.Image]
    scans: dict[int, NDArray[np.float32]]
    by_digit: dict[str, list[int]]


@dataclass
class Origin:
    """The photograph behind a picture (with the crop's box in it, at `SHORT_SIDE`) and the scans in
    it.

    The texture of painted objects comes from photographs of the same split and is not noted.
    """

    photo: str = ""
    crop: tuple[int, int, int, int] | None = None
    scans: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"photo": self.photo, "crop": self.crop, "scans": self.scans}


@lru_cache(maxsize=2)
def load_assets(train: bool) -> Assets:
    """The split's scans and photographs. Needs the extra `sample` (scikit-learn, scikit-image)."""
    from skimage import data
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = [index for index in range(len(digits.target)) if (index % 5 != 0) == train]
    by_digit: dict[str, list[int]] = {str(digit): [] for digit in range(10)}
    for index in chosen:
        by_digit[str(digits.target[index])].append(index)
    photos = {name: _small(getattr(data, name)()) for name in (TRAIN_PHOTOS if train else HELD_OUT_PHOTOS)}
    return Assets(photos, {index: (digits.images[index] / 16).astype(np.float32) for index in chosen}, by_digit)


def _small(pixels: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(pixels).convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)


def photo_crop(assets: Assets, rng: random.Random, width: int, height: int, origin: Origin) -> NDArray[np.float32]:
    """A random part of a random photograph as float [height, width, 3] in 0-255, noted in `origin`."""
    origin.photo = rng.choice(sorted(assets.photos))
    photo = assets.photos[origin.photo]
    zoom = rng.uniform(1.0, 1.9)
    w, h = min(photo.width, int(width * zoom)), min(photo.height, int(height * zoom))
    x, y = rng.randint(0, photo.width - w), rng.randint(0, photo.height - h)
    origin.crop = (x, y, x + w, y + h)
    resized = photo.resize((width, height), Image.Resampling.BILINEAR, box=origin.crop)
    return np.asarray(resized, dtype=np.float32)
