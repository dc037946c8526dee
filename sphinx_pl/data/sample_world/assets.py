"""The "real" domain is made of scanned digits and photographs, which are split before any picture
is made.

The scans are the 1797 handwritten digits (8x8) of the UCI optical recognition set that scikit-learn
contains. The photographs are those in scikit-image's wheel, and none is downloaded. A scan belongs
to the held-out split if its index is a multiple of five, a photograph if `HELD_OUT_PHOTOS` names
it.
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

SHORT_SIDE = 240
"""The shorter side of a photograph in pixels: a crop of a picture's size shows some content."""


@dataclass(frozen=True)
class Assets:
    """The photographs and scans of one split.

    Photographs are RGB. A scan is a mask [8, 8] in 0-1, by its index in the full set. `by_digit`
    has the indices of each digit.
    """

    photos: dict[str, Image.Image]
    scans: dict[int, NDArray[np.float32]]
    by_digit: dict[str, list[int]]


@dataclass
class Origin:
    """The photograph and the scans that a picture is made of, with the crop's box at `SHORT_SIDE`.

    The texture of painted objects comes from photographs of the same split and is not recorded.
    """

    photo: str = ""
    crop: tuple[int, int, int, int] | None = None
    scans: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"photo": self.photo, "crop": self.crop, "scans": self.scans}


@lru_cache(maxsize=2)
def load_assets(train: bool) -> Assets:
    """Return the split's scans and photographs.

    The extra `sample` (scikit-learn, scikit-image) must be installed.
    """
    from skimage import data
    from sklearn.datasets import load_digits

    digits = load_digits()
    indices = [index for index in range(len(digits.target)) if (index % 5 != 0) == train]
    by_digit: dict[str, list[int]] = {str(digit): [] for digit in range(10)}
    for index in indices:
        by_digit[str(digits.target[index])].append(index)
    photos = {name: _small(getattr(data, name)()) for name in (TRAIN_PHOTOS if train else HELD_OUT_PHOTOS)}
    return Assets(photos, {index: (digits.images[index] / 16).astype(np.float32) for index in indices}, by_digit)


def _small(pixels: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(pixels).convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)


def photo_crop(assets: Assets, rng: random.Random, width: int, height: int, origin: Origin) -> NDArray[np.float32]:
    """A random part of a random photograph, float [height, width, 3] in 0-255."""
    origin.photo = rng.choice(sorted(assets.photos))
    photo = assets.photos[origin.photo]
    zoom = rng.uniform(1.0, 1.9)
    w, h = min(photo.width, int(width * zoom)), min(photo.height, int(height * zoom))
    x, y = rng.randint(0, photo.width - w), rng.randint(0, photo.height - h)
    origin.crop = (x, y, x + w, y + h)
    resized = photo.resize((width, height), Image.Resampling.BILINEAR, box=origin.crop)
    return np.asarray(resized, dtype=np.float32)
