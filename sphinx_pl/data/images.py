"""Encoded images -> square uint8 tensors, as the original's `padded_resize` makes them."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
import stat
import unicodedata
import warnings
from contextlib import suppress

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from sphinx_pl.data.coordinates import Size, holds_coordinates, same_shape
from sphinx_pl.data.files import read_span
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample

PAD_COLOUR = (122, 116, 104)
"""CLIP's mean colour in bytes; the original pads with it."""

MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 28
MAX_ASPECT = 100
_HEADER_BYTES = 1 << 16

# Pillow also reads formats that run programs (EPS) or reach for other files; these are the ones
# that data sets hold. A JPEG file of several pictures (MPO) is opened as JPEG. Pillow may be built
# without AVIF.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# EXIF's orientations that swap width and height, and what turns the upright picture back to the
# stored one.
_TURNED_BACK = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

_WHITES = (255, 65535)
"""The values of white that are recognised in a channel of more than 8 bits."""

_DARKEST = 16
"""A brightness on a scale of 256. A colour picture of 16 bits a channel that is darker everywhere
has values of 12 bits or fewer."""


def load_image(ref: ImageRef, size: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """One image, read, decoded, cropped and flipped as `ref` says, then padded and resized.

    If `ref.annotated` is given, the image is shown in the orientation that has this shape: upright,
    or as stored if EXIF turns it and only the stored pixels have the shape. An image of the same
    shape in another resolution has the same fractions, so it is used. If the shape does not decide
    (squares, images that are mirrored or upside down), the image is upright.

    Returns:
        uint8 [3, size, size], RGB, the image in the middle of a square of `PAD_COLOUR`.

    Raises:
        SkipSample: image_missing, image_empty, image_unreadable, image_truncated, image_dark,
            crop_outside, size_mismatch, or, before any pixel is decoded, image_too_large and
            image_aspect.
    """
    image = decode(read_bytes(ref), ref.path, max_pixels, ref.annotated)
    if ref.crop is not None:
        image = image.crop(_checked_crop(ref, image.size))
    if ref.flip:
        image = ImageOps.mirror(image)
    return to_tensor(padded_resize(image, size))


def annotated_images(record: Record) -> tuple[ImageRef, ...]:
    """The record's images, each with the size that the record states if it has coordinates."""
    texts = (text for turn in record.turns for text in (turn.question, turn.answer))
    if not record.sizes or not (record.regions or any(map(holds_coordinates, texts))):
        return record.images
    stated = [
        # The size of a cropped image is the crop's.
        image if image.crop is not None else dataclasses.replace(image, annotated=size)
        for image, size in zip(record.images, record.sizes, strict=False)
    ]
    return (*stated, *record.images[len(stated) :])


def to_tensor(image: Image.Image) -> Tensor:
    """A uint8 tensor [3, height, width] of an RGB image."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def read_bytes(ref: ImageRef, limit: int | None = None) -> bytes:
    """The first `limit` encoded bytes of an image: of a file, or of its part of a tar shard."""
    size = ref.size if ref.size >= 0 else MAX_BYTES + 1
    if size > MAX_BYTES + 1:
        raise SkipSample("image_too_large", f"{ref.path} should have {size} bytes")
    wanted = size if limit is None else min(size, limit)
    try:
        if ref.size >= 0:  # a shard that the configuration names: it may be a URL, and is read several times
            data = read_span(ref.path, ref.offset, wanted)
        else:
            # An annotation file can name anything: a device or a pipe would never end.
            path, status = _found(ref.path)
            if not stat.S_ISREG(status.st_mode):
                raise SkipSample("image_unreadable", f"{ref.path} is not a file")
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                data = file.read(min(wanted, status.st_size))  # all of `wanted` would be allocated
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte or half a character
        raise SkipSample("image_missing", f"{ref.path!r}: {getattr(error, 'strerror', error)}") from None
    if not data:
        raise SkipSample("image_empty", ref.path)
    if len(data) > MAX_BYTES:
        raise SkipSample("image_too_large", f"{ref.path} has more than {MAX_BYTES} bytes")
    if len(data) < (ref.size if limit is None else min(ref.size, limit)):
        raise SkipSample("image_truncated", f"{ref.path} ends inside the image")
    return data


def _found(path: str) -> tuple[str, os.stat_result]:
    """The path under which a file is there, and its status.

    Archives that macOS wrote have accents as characters of their own (NFD) in names, where an
    annotation has composed ones (NFC).

    Raises:
        OSError, ValueError: it is not there.
    """
    try:
        return path, os.stat(path)  # noqa: PTH116 - a path object costs more than the call
    except FileNotFoundError:
        for other in {unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)} - {path}:
            with suppress(FileNotFoundError):
                return other, os.stat(other)  # noqa: PTH116
        raise


def image_size(ref: ImageRef) -> Size:
    """(width, height) of an image as `load_image` shows it, from its header; of the crop if `ref`
    has one.

    Raises:
        SkipSample: as `load_image`, for what the header shows.
    """
    try:
        size, _ = _shown(_open(read_bytes(ref, _HEADER_BYTES), ref.path, MAX_PIXELS), ref.path, ref.annotated)
    except SkipSample as error:
        if error.reason not in ("image_unreadable", "image_truncated"):
            raise
        # A header that is longer, or a format that is read whole.
        size, _ = _shown(_open(read_bytes(ref), ref.path, MAX_PIXELS), ref.path, ref.annotated)
    if ref.crop is None:
        return size
    x1, y1, x2, y2 = _checked_crop(ref, size)
    return x2 - x1, y2 - y1


def _checked_crop(ref: ImageRef, size: Size) -> tuple[int, int, int, int]:
    """The crop in pixels of the image, whose resolution may differ from the annotated one."""
    assert ref.crop is not None
    (x1, y1, x2, y2), (width, height) = ref.crop, ref.annotated or size
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise SkipSample("crop_outside", f"{ref.path}: {ref.crop} of {width}x{height}")
    return x1 * size[0] // width, y1 * size[1] // height, -(-x2 * size[0] // width), -(-y2 * size[1] // height)


def _shown(image: Image.Image, name: str, annotated: Size | None) -> tuple[Size, Image.Transpose | None]:
    """(width, height) of an opened image as it is shown, and the transpositions that the upright
    image needs for that.

    Raises:
        SkipSample: size_mismatch, or the header is damaged.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        tags = getattr(image, "tag_v2", None)  # of TIFF, whose size Pillow gives turned already
        stored = image.size if tags is None else (int(tags[256]), int(tags[257]))
    except Exception as error:  # damaged headers make Pillow raise nearly anything
        raise SkipSample("image_unreadable", f"{name}: {error}") from None
    back = _TURNED_BACK.get(orientation) if isinstance(orientation, int) else None
    upright = stored if back is None else stored[::-1]
    if annotated is None or same_shape(upright, annotated):
        return upright, None
    if back is not None and same_shape(stored, annotated):
        return stored, back
    (width, height), (told_width, told_height) = upright, annotated
    raise SkipSample("size_mismatch", f"{name} is {width}x{height}, its annotation says {told_width}x{told_height}")


def decode(data: bytes, name: str = "", max_pixels: int = MAX_PIXELS, annotated: Size | None = None) -> Image.Image:
    """The RGB image of encoded bytes (first frame, transparency on white), upright or as
    `load_image` says.

    Raises:
        SkipSample: as `load_image`; its detail calls the image `name`.
    """
    image = _open(data, name, max_pixels)
    upper_bits = "RGBL" if any(map(_has_16_bits, image.tile)) else ""  # of these channels Pillow keeps 8
    back = None if annotated is None else _shown(image, name, annotated)[1]
    try:
        image.load()
        upright = upright_rgb(image)
        bands = [image.getchannel(band) for band in image.getbands() if band in upper_bits]
        if bands and max(int(np.asarray(band).max()) for band in bands) < _DARKEST:
            raise SkipSample("image_dark", f"{name} has 16 bits a channel and uses at most 12: convert it to 8 bits")
    except SkipSample:
        raise
    except Exception as error:  # as above
        reason = "image_truncated" if "truncated" in str(error) else "image_unreadable"
        raise SkipSample(reason, f"{name}: {error}") from None
    return upright if back is None else upright.transpose(back)


def _has_16_bits(tile: ImageFile._Tile) -> bool:
    args = tile.args
    return ";16" in str(args) or (tile.codec_name.startswith("ppm") and isinstance(args, tuple) and args[1] > 255)


def _open(data: bytes, name: str, max_pixels: int) -> ImageFile.ImageFile:
    """The opened image: its header is read and its size is checked, but no pixel is decoded."""
    bound = f"at most {max_pixels:,} pixels and {2 * math.isqrt(max_pixels):,} a side can be read: make it smaller"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own bound, which is the higher one, and of missing codecs
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        pixels = re.search("[0-9]+", str(error))
        raise SkipSample("image_too_large", f"{name}: {int(pixels[0]) if pixels else 0:,} pixels, {bound}") from None
    except UnidentifiedImageError:
        raise SkipSample("image_unreadable", f"{name}: {_what_instead(data)}") from None
    except Exception as error:  # damaged headers make Pillow raise nearly anything
        raise SkipSample("image_unreadable", f"{name}: {error}") from None
    width, height = image.size
    # The padded square is what will be allocated: a thin image's is much larger than the image.
    if width * height > max_pixels or max(width, height) ** 2 > 4 * max_pixels:
        raise SkipSample("image_too_large", f"{name}: {width}x{height}, {bound}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SkipSample("image_aspect", f"{name}: {width}x{height}, a side may be {MAX_ASPECT} times the other one")
    return image


def _what_instead(data: bytes) -> str:
    """The likely content of a file without an image, in words."""
    start = data[:200].decode("utf-8-sig", "replace").strip()
    if start.startswith("version https://git-lfs"):
        return "it is a Git LFS pointer, not the image: `git lfs pull` gets the image"
    if re.match(r"<(!doctype )?html", start, re.IGNORECASE):
        return "it is a web page, not an image: download it again"
    first = start.split("\n", 1)[0].strip()
    if len(first) > 1 and first.isprintable() and "\ufffd" not in first:
        return f"it is text, not an image: {first[:40]!r}"
    if data[4:8] == b"ftyp":
        return f"its format {data[8:12].decode('latin-1')!r} cannot be read here"
    return f"it is none of {', '.join(_FORMATS)}"


def padded_resize(image: Image.Image, size: int) -> Image.Image:
    """An RGB image in the middle of a square of its longer side, resized by bicubic interpolation
    with antialiasing."""
    width = side = max(image.size)
    if image.width > image.height:
        # Pillow resizes along rows first, then along columns. Rows of padding come out of the first
        # pass as they went in, so only the image's own have to go through it: the same bytes in
        # less time.
        image = image.resize((width := size, image.height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (width, side), PAD_COLOUR)
    square.paste(image, ((width - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB with EXIF's orientation applied, on white where it is transparent;
    `_eight_bits` scales deep grey.

    Raises:
        SkipSample: image_unreadable, if no value is a number.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # of an upright one it would return a copy
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of integers or floats in 8 bits. Pillow's own conversion would clip at 255.

    65535 is white if the largest value is in the upper half of 16 bits; 255 is white if it is in
    the upper half of 8 bits. Other images use another scale (12 bits of a scanner, 0 to 1,
    heights): their smallest value becomes black and their largest white. NaN becomes black, and an
    infinite value becomes the nearer end.
    """
    values = np.array(image, dtype=np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        if not finite.any():
            raise SkipSample("image_unreadable", "none of its values is a number")
        ends = float(values[finite].min()), float(values[finite].max())
        np.nan_to_num(values, copy=False, nan=ends[0], neginf=ends[0], posinf=ends[1])
    low, high = float(values.min()), float(values.max())
    white = next((white for white in _WHITES if low >= 0 and white / 2 < high <= white), None)
    if white is not None:
        low, high = 0.0, float(white)
    elif low == high:  # there is no range: the narrowest usual one
        low, high = 0.0, next((float(white) for white in (1, 255, 4095, 65535) if high <= white), high)
    values -= low
    values *= 255 / (high - low)
    values += 1e-3  # float32's error must not round a whole number down
    return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))
