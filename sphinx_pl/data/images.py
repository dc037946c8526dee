"""Encoded images -> square uint8 tensors, as the original's `padded_resize` makes them."""

from __future__ import annotations

import io
import os
import stat
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.files import read_span
from sphinx_pl.data.record import ImageRef

PAD_COLOUR = (122, 116, 104)
"""CLIP's mean colour in bytes, what the original pads with."""

MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 28
MAX_ASPECT = 100
_HEADER_BYTES = 1 << 16

# Pillow also reads formats that run programs (EPS) or reach for other files; these are the ones that data sets hold.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO")


def load_image(ref: ImageRef, size: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read, decode, crop and flip as `ref` says, pad and resize one image.

    Returns:
        uint8 [3, size, size], RGB, the image in the middle of a square of `PAD_COLOUR`.

    Raises:
        BadSample: image_missing, image_empty, image_unreadable, image_truncated, crop_outside, or, before any pixel is
            decoded, image_too_large and image_aspect.
    """
    image = decode(read_bytes(ref), ref.path, max_pixels)
    if ref.crop is not None:
        image = image.crop(_checked_crop(ref, image.size))
    if ref.flip:
        image = ImageOps.mirror(image)
    return to_tensor(padded_resize(image, size))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, height, width]."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def read_bytes(ref: ImageRef, limit: int | None = None) -> bytes:
    """The encoded bytes of an image, at most the first `limit`: a whole file, or its part of a tar shard."""
    size = ref.size if ref.size >= 0 else MAX_BYTES + 1
    if size > MAX_BYTES + 1:
        raise BadSample("image_too_large", f"{ref.path} should have {size} bytes")
    wanted = size if limit is None else min(size, limit)
    try:
        if ref.size >= 0:  # a shard, named by the configuration: it may be a URL, and is read from again
            data = read_span(ref.path, ref.offset, wanted)
        else:
            # An annotation file can name anything: a device or a pipe would never end.
            status = os.stat(ref.path)  # noqa: PTH116 - a path object costs more than the call
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("image_unreadable", f"{ref.path} is not a file")
            with open(ref.path, "rb", buffering=0) as file:  # noqa: PTH123
                data = file.read(min(wanted, status.st_size))  # all of `wanted` would be allocated
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte or half a character
        raise BadSample("image_missing", f"{ref.path!r}: {getattr(error, 'strerror', error)}") from None
    if not data:
        raise BadSample("image_empty", ref.path)
    if len(data) > MAX_BYTES:
        raise BadSample("image_too_large", f"{ref.path} has more than {MAX_BYTES} bytes")
    if len(data) < (ref.size if limit is None else min(ref.size, limit)):
        raise BadSample("image_truncated", f"{ref.path} ends inside the image")
    return data


def image_size(ref: ImageRef) -> tuple[int, int]:
    """(width, height) of an image as `decode` gives it, from its header; of its crop where `ref` has one.

    Raises:
        BadSample: as `load_image`, where the header shows it.
    """
    try:
        image = _open(read_bytes(ref, _HEADER_BYTES), ref.path, MAX_PIXELS)
        turned = _turned(image)
    except BadSample as error:
        if error.reason not in ("image_unreadable", "image_truncated"):
            raise
        # A header that is longer, or a format that is read whole.
        image = _open(read_bytes(ref), ref.path, MAX_PIXELS)
        turned = _turned(image)
    size = (image.height, image.width) if turned else image.size
    if ref.crop is None:
        return size
    x1, y1, x2, y2 = _checked_crop(ref, size)
    return x2 - x1, y2 - y1


def _checked_crop(ref: ImageRef, size: tuple[int, int]) -> tuple[int, int, int, int]:
    assert ref.crop is not None
    x1, y1, x2, y2 = ref.crop
    if not (0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]):
        raise BadSample("crop_outside", f"{ref.path}: {ref.crop} of {size[0]}x{size[1]}")
    return x1, y1, x2, y2


def _turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception as error:  # damaged headers make Pillow raise nearly anything
        raise BadSample("image_unreadable", str(error)) from None


def decode(data: bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes -> an upright RGB image (EXIF orientation applied, first frame, transparency on white).

    Raises:
        BadSample: as `load_image`; `name` is what its detail calls the image.
    """
    image = _open(data, name, max_pixels)
    try:
        image.load()
        return upright_rgb(image)
    except Exception as error:  # as above
        reason = "image_truncated" if "truncated" in str(error) else "image_unreadable"
        raise BadSample(reason, f"{name}: {error}") from None


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """With its header read and its size found bearable, its pixels not yet decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is the lower one
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", f"{name}: {error}") from None
    except Exception as error:  # damaged headers make Pillow raise nearly anything
        raise BadSample("image_unreadable", f"{name}: {error}") from None
    width, height = image.size
    # The padded square is what will be allocated: a thin image's is much larger than the image.
    if width * height > max_pixels or max(width, height) ** 2 > 4 * max_pixels:
        raise BadSample("image_too_large", f"{name}: {width}x{height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample("image_aspect", f"{name}: {width}x{height}")
    return image


def padded_resize(image: Image.Image, size: int) -> Image.Image:
    """Paste an RGB image in the middle of a square of its longer side and resize that, bicubic with antialias."""
    width = side = max(image.size)
    if image.width > image.height:
        # Pillow resizes along rows first, then along columns. Rows of padding come out of the first pass as they went
        # in, so only the image's own have to go through it: the same bytes in less time.
        image = image.resize((width := size, image.height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (width, side), PAD_COLOUR)
    square.paste(image, ((width - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def upright_rgb(image: Image.Image) -> Image.Image:
    """EXIF orientation applied, transparency on white, RGB."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # of an upright one it would return a copy
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
