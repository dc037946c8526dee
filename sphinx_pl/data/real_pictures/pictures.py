"""Photographs and clip art from the packages: what each shows, and which split it belongs to.

A picture is skipped with a reason: it is unreadable, too small, a repetition, or a symbol or style
that names no object. The split follows from the noun of its name, so all pictures of an object, in
both packages, are in one split.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sphinx_pl.data.images import MAX_ASPECT, MAX_PIXELS
from sphinx_pl.data.real_pictures.names import ObjectName, name_in_sentence, name_in_title
from sphinx_pl.data.real_pictures.packages import FetchedPackage

PHOTOGRAPHS, CLIP_ART = "photographs", "clip art"
DOMAINS = (PHOTOGRAPHS, CLIP_ART)
TRAIN, VAL, TEST = "train", "val", "test"
KNOWN = "known"
"""The split of some further pictures of objects that training shows: unseen pictures of seen
objects."""
SHARES = {TEST: 0.18, VAL: 0.08}
"""The shares of the objects that are held out."""
KNOWN_SHARE = 0.3

LONGEST_SIDE = 256
SHORTEST_SIDE = 24
FLAT = 0.4
"""The share of equal neighbours from which on a picture counts as drawn. Photographs have noise."""
_FLAT_STEP = 2
_OPAQUE = 200
_MAX_SVG = 1 << 23

# Folders whose pictures show letters, signs, flags or decoration, but no object that has a name.
_NO_OBJECT = re.compile(
    r"symbols/|seasonal/hanukkah/|town/roadsigns/|shapes/|special/|signs_and_symbols/|unsorted/|logos/|decorations/"
    r"|computer/(icons|buttons|connectors|diagrams|folders|network|games)/|recreation/games/cards/"
    r"|transportation/(roadsigns|aiga-symbols)/|people/(smilies|stickmen)/|office/?[^/]*(arrow|note)"
)
_DRAWN_FOLDER = re.compile(r"/cartoon/|/houses/")
# More pictures of one title are a collection's, which says nothing about each.
_MOST_OF_A_TITLE = 6
# Tags of the library, not of a picture.
_NO_KEYWORDS = frozenset(
    ("clipart", "clip", "art", "hash", "unsorted", "color", "colour", "media", "svg", "image", "picture", "symbol")
)
MOST_KEYWORDS = 3
_RDF = re.compile(rb"<rdf:RDF.*?</rdf:RDF>", re.DOTALL)
_DC = "{http://purl.org/dc/elements/1.1/}"
_LIST_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
_CREDIT = re.compile(r"^.*?\bby [^-]* - ", re.IGNORECASE)


@dataclass(frozen=True)
class RealPicture:
    """One picture of a package.

    Attributes:
        key: the package and the path in it.
        category: its first folder, such as "animals".
        caption: what the package says about it, as a sentence.
        name: the object, or None if the description does not name one. Such a picture is for
            pretraining alone.
        pixels: RGBA, at most `LONGEST_SIDE` a side, cut to what is not transparent.
        hash: see `picture_hash`.
    """

    key: str
    domain: str
    category: str
    caption: str
    name: ObjectName | None
    pixels: Image.Image
    hash: NDArray[np.uint8]
    split: str = TRAIN

    @property
    def flattened(self) -> Image.Image:
        """The picture on white."""
        return on_canvas(self.pixels, (255, 255, 255))


def on_canvas(pixels: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return an RGBA picture on a canvas of its own size, as RGB."""
    canvas = Image.new("RGBA", pixels.size, color)
    canvas.alpha_composite(pixels)
    return canvas.convert("RGB")


@dataclass(frozen=True)
class SkippedPicture:
    """A picture that is not used, and the reason."""

    key: str
    reason: str


def read_pictures(
    stamps: FetchedPackage, drawings: FetchedPackage, annotations: FetchedPackage, words: frozenset[str]
) -> tuple[list[RealPicture], list[SkippedPicture]]:
    """Return the usable pictures of both packages in order, with their splits, and the skipped ones.

    Args:
        stamps: pictures with a description beside each.
        drawings: clip art as PNG.
        annotations: the same clip art as SVG, with titles and keywords.
        words: the English words that names consist of.
    """
    pictures: list[RealPicture] = []
    skipped: list[SkippedPicture] = []
    for item in (*_stamps(stamps, words), *_clip_art(drawings, annotations, words)):
        if isinstance(item, RealPicture):
            pictures.append(item)
        else:
            skipped.append(item)
    kept, repeated = without_duplicates(pictures)
    skipped += [SkippedPicture(picture.key, "duplicate") for picture in repeated]
    return split_pictures(kept), skipped


def _stamps(package: FetchedPackage, words: frozenset[str]) -> Iterator[RealPicture | SkippedPicture]:
    for path in package.paths(".png"):
        key = f"{package.package.name}/{path}"
        folder = path.partition("/stamps/")[2]
        text = (package.folder / path).with_suffix(".txt")
        caption = _first_line(text)
        if problem := _unusable(folder):
            yield SkippedPicture(key, problem)
        elif not caption:
            yield SkippedPicture(key, "description_missing")
        elif isinstance(pixels := read_pixels(package.folder / path), str):
            yield SkippedPicture(key, pixels)
        else:
            name = name_in_sentence(caption) or name_in_title(text.stem, words)
            drawn = bool(_DRAWN_FOLDER.search(folder)) or flatness(pixels) >= FLAT
            domain = CLIP_ART if drawn else PHOTOGRAPHS
            if drawn:
                caption = clean_caption(name, (), words) if name else caption
            yield RealPicture(key, domain, folder.split("/")[0], caption, name, pixels, picture_hash(pixels))


def _clip_art(
    drawings: FetchedPackage, annotations: FetchedPackage, words: frozenset[str]
) -> Iterator[RealPicture | SkippedPicture]:
    titles: dict[str, tuple[str, list[str]] | str] = {}
    for path in annotations.paths(".svg"):
        titles[_stem(path, "/svg/")] = read_annotation(annotations.folder / path)
    times = Counter(entry[0] for entry in titles.values() if not isinstance(entry, str))
    for path in drawings.paths(".png"):
        key = f"{drawings.package.name}/{path}"
        stem = _stem(path, "/png/")
        entry = titles.get(stem, "annotation_missing")
        if problem := _unusable(f"{stem}.png"):
            yield SkippedPicture(key, problem)
            continue
        if isinstance(entry, str):
            yield SkippedPicture(key, entry)
            continue
        title, keywords = entry
        name = name_in_title(_CREDIT.sub("", title), words)
        if times[title] > _MOST_OF_A_TITLE:
            yield SkippedPicture(key, "title_of_a_collection")
        elif name is None:
            yield SkippedPicture(key, "title_no_name")
        elif isinstance(pixels := read_pixels(drawings.folder / path), str):
            yield SkippedPicture(key, pixels)
        else:
            caption = clean_caption(name, keywords, words)
            yield RealPicture(key, CLIP_ART, stem.split("/")[0], caption, name, pixels, picture_hash(pixels))


def _stem(path: str, below: str) -> str:
    return path.partition(below)[2].rpartition(".")[0]


def _unusable(path: str) -> str:
    """Return why a path is not used, "" if it is."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "name_not_unicode"
    if not path.isprintable():
        return "name_not_printable"
    return "no_object" if _NO_OBJECT.match(path) else ""


def _first_line(path: Path) -> str:
    """Return the English description, "" if there is none. Other languages follow it."""
    try:
        with path.open(encoding="utf-8") as file:
            line = " ".join(file.readline(1000).split())
    except (OSError, UnicodeDecodeError):
        return ""
    return line if line.isprintable() else ""


def read_annotation(path: Path) -> tuple[str, list[str]] | str:
    """Return the title and the keywords in an SVG's metadata, or why they cannot be read.

    Only the metadata are parsed. They have no document type, so no entity is ever expanded.
    """
    try:
        if path.stat().st_size > _MAX_SVG:
            return "annotation_too_large"
        found = _RDF.search(path.read_bytes())
        if found is None:
            return "annotation_missing"
        work = ElementTree.fromstring(found[0])
    except (OSError, ElementTree.ParseError, ValueError, RecursionError):
        return "annotation_unreadable"
    title = " ".join((work.findtext(f"*/{_DC}title") or "").split())
    keywords = [" ".join((item.text or "").replace("_", " ").split()).lower() for item in work.iter(_LIST_ITEM)]
    return (title, keywords) if title else "title_missing"


def clean_caption(name: ObjectName, keywords: Sequence[str], words: frozenset[str]) -> str:
    """Return the caption of a drawing: its name, and keywords that add something to it."""
    own = {*name.text.split(), name.noun}
    tags = sorted(
        {
            keyword
            for keyword in keywords
            if keyword
            and keyword not in own
            and keyword not in _NO_KEYWORDS
            and all(word in words for word in keyword.split())
        }
    )[:MOST_KEYWORDS]
    return f"A drawing of {name.phrase}{' (' + ', '.join(tags) + ')' if tags else ''}."


def read_pixels(path: Path) -> Image.Image | str:
    """Return a PNG as RGBA without its transparent border, or why it is not used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",))
            if image.width * image.height > MAX_PIXELS:
                return "picture_too_large"
            pixels = image.convert("RGBA")
    except Exception:  # damaged pictures make Pillow raise nearly anything
        return "picture_unreadable"
    box = pixels.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    if box is None:
        return "picture_transparent"
    pixels = pixels.crop(box)
    if max(pixels.size) > LONGEST_SIDE:
        pixels.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    if min(pixels.size) < SHORTEST_SIDE or max(pixels.size) > MAX_ASPECT * min(pixels.size):
        return "picture_too_small"
    return pixels


def flatness(pixels: Image.Image) -> float:
    """Return the share of opaque pixels that equal their neighbour on the right."""
    small = pixels.copy()
    small.thumbnail((128, 128))
    values = np.asarray(small).astype(np.int16)
    left, right = values[:, :-1], values[:, 1:]
    opaque = (left[..., 3] > _OPAQUE) & (right[..., 3] > _OPAQUE)
    equal = np.abs(left - right)[..., :3].max(-1) <= _FLAT_STEP
    return float(equal[opaque].mean()) if opaque.any() else 1.0


def picture_hash(pixels: Image.Image) -> NDArray[np.uint8]:
    """Return a perceptual hash [72] of a picture on white.

    It is a difference hash ("dHash") of each colour: whether a pixel of 8 x 8 is clearly darker or
    lighter than its neighbour on the right. The mean colours of the rows follow. So the hash
    survives another size, and tells apart pictures of other colours.
    """
    small = np.asarray(on_canvas(pixels, (255, 255, 255)).resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    # Small steps count as none, since on an even surface they are noise.
    steps = np.digitize(np.diff(small, axis=1), (-8, 8))
    return np.concatenate([np.packbits(steps == 0), np.packbits(steps == 2), (small.mean(1) / 16).flatten()]).astype(
        np.uint8
    )


def alike(hashes: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which of the hashes [n, 72] are of the same picture as the other hash [72]."""
    bits = np.bitwise_count(hashes[:, :48] ^ other[:48]).sum(1)
    shades = np.abs(hashes[:, 48:].astype(np.int16) - other[48:]).max(1)
    return np.asarray((bits <= 12) & (shades <= 1))


def without_duplicates(pictures: Sequence[RealPicture]) -> tuple[list[RealPicture], list[RealPicture]]:
    """Return the pictures without those that repeat an earlier one, and the repetitions."""
    kept: list[RealPicture] = []
    repeated: list[RealPicture] = []
    hashes = np.zeros((len(pictures), 72), np.uint8)
    for picture in pictures:
        if alike(hashes[: len(kept)], picture.hash).any():
            repeated.append(picture)
        else:
            hashes[len(kept)] = picture.hash
            kept.append(picture)
    return kept, repeated


def share_of(text: str) -> float:
    """Return a number from 0 to 1 that depends on a text alone, and not on a seed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def split_of(noun: str) -> str:
    """Return the split of an object."""
    share = share_of(f"object {noun}")
    return TEST if share < SHARES[TEST] else VAL if share < SHARES[TEST] + SHARES[VAL] else TRAIN


def split_pictures(pictures: Sequence[RealPicture]) -> list[RealPicture]:
    """Return the pictures with their splits.

    A picture without a name is for training. Of an object with further pictures in its domain, some
    are put aside as `KNOWN`, never the first.
    """
    of_object: dict[tuple[str, str], int] = defaultdict(int)
    result = []
    for picture in pictures:
        if picture.name is None:
            result.append(picture)
            continue
        split = split_of(picture.name.noun)
        earlier = of_object[picture.domain, picture.name.noun]
        of_object[picture.domain, picture.name.noun] += 1
        if split == TRAIN and earlier and share_of(f"picture {picture.key}") < KNOWN_SHARE:
            split = KNOWN
        result.append(replace(picture, split=split))
    return result
