"""Filters of image-text pairs. A filtered pair is counted as `<source>/filtered/<reason>`."""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from sphinx_pl.data.images import image_size
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import Filtered, SkipSample
from sphinx_pl.utils.errors import UserError

_WORD = re.compile(r"\w+")
_CONDITIONS = ("min", "max", "in", "not_in")
_ALWAYS = ("caption", "width", "height")


def key_hash(key: str) -> int:
    """A 64-bit hash of a record's key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest())


@dataclass
class PairFilters:
    """Inclusive bounds on images, captions and columns of the json; null or {} sets none."""

    min_side: Optional[int] = None
    """Pixels of the shorter side of the stored image."""
    max_aspect: Optional[float] = None
    """Longer side over shorter side."""
    min_chars: int = 1
    max_chars: int = 2000
    min_words: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    """Bounds on columns of the json: {similarity: {min: 0.28}, punsafe: {max: 0.2}, LICENSE: {in:
    ["?"]}}.

    A pair without such a column is filtered. Every pair has caption, width and height: if the json
    has none, they are those of its caption and its image.
    """
    parrot_column: Optional[str] = None
    """The column with the text that OCR read in the image.

    Captions that only spell it out teach reading instead of seeing ("Parrot Captions Teach CLIP to
    Spot Text", arXiv 2312.14232).
    """
    parrot_share: float = 0.5
    """The share of the caption's words in the OCR column from which the pair is filtered."""
    duplicates: Optional[str] = None
    """A file of `sphinx-data duplicates`, with all but the first of equal pairs."""

    def __post_init__(self) -> None:
        for column, conditions in self.columns.items():
            unknown = set(conditions) - set(_CONDITIONS) if isinstance(conditions, dict) else {conditions}
            if unknown:
                raise UserError(f"filters.columns.{column}: {unknown.pop()!r} is not one of {', '.join(_CONDITIONS)}")
            _check_conditions(f"filters.columns.{column}", conditions)
        _check_order("filters.min_chars", self.min_chars, "max_chars", self.max_chars)
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise UserError(f"filters.max_aspect={self.max_aspect} is longer over shorter side: it must be at least 1")
        if not 0 < self.parrot_share <= 1:
            raise UserError(f"filters.parrot_share={self.parrot_share} must be above 0 and at most 1")

    @property
    def needed(self) -> dict[str, str]:
        """Column -> the key that asks for it, for columns that a pair may lack."""
        keys = {column: f"filters.columns.{column}" for column in self.columns if column not in _ALWAYS}
        return keys | ({self.parrot_column: "filters.parrot_column"} if self.parrot_column is not None else {})

    def check(self, record: Record, columns: Mapping[str, Any]) -> None:
        """Check that the record meets the filters.

        Args:
            columns: the record's whole annotation; its meta is a part of it.

        Raises:
            Filtered: it does not.
            SkipSample: the size of its image is needed and cannot be read.
        """
        self._check_caption(record, columns)
        for column, conditions in self.columns.items():
            _check_column(record, columns, column, conditions)
        if self.duplicates is not None:
            hashed = key_hash(record.key)
            place = int(np.searchsorted(self._duplicates, np.uint64(hashed)))
            if place < len(self._duplicates) and int(self._duplicates[place]) == hashed:
                raise Filtered("duplicate", record.key)
        if self.min_side is not None or self.max_aspect is not None:
            width, height = _size(record)
            if min(width, height) < (self.min_side or 0):
                raise Filtered("image_side", f"{record.key}: {width}x{height}")
            if self.max_aspect is not None and max(width, height) > self.max_aspect * min(width, height):
                raise Filtered("image_aspect", f"{record.key}: {width}x{height}")

    def _check_caption(self, record: Record, columns: Mapping[str, Any]) -> None:
        caption = record.answer
        if not self.min_chars <= len(caption) <= self.max_chars:
            raise Filtered("caption_chars", f"{record.key}: {len(caption)} characters")
        if not self.min_words and self.parrot_column is None:
            return
        words = _WORD.findall(caption.lower())
        if len(words) < self.min_words:
            raise Filtered("caption_words", f"{record.key}: {len(words)} words")
        if self.parrot_column is not None and words:
            read = columns.get(self.parrot_column)
            counts = Counter(_WORD.findall(read.lower() if isinstance(read, str) else ""))
            spelt = (Counter(words) & counts).total()
            if spelt >= self.parrot_share * len(words):
                raise Filtered("parrot", f"{record.key}: {spelt} of {len(words)} words stand in the image")

    @cached_property
    def _duplicates(self) -> npt.NDArray[np.uint64]:
        assert self.duplicates is not None
        try:
            keys: npt.NDArray[np.uint64] = np.load(self.duplicates, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(
                f"filters.duplicates={self.duplicates} cannot be read ({error}): make it with `sphinx-data duplicates`"
            ) from None
        return keys


def _check_conditions(key: str, conditions: Mapping[str, Any]) -> None:
    """Raises: UserError: no value meets the conditions, or no value can be compared with them."""
    for name, bound in conditions.items():
        if name in ("in", "not_in"):
            if not isinstance(bound, list | tuple) or not bound:
                raise UserError(f"{key}.{name}={bound} must be a list of values, such as [a, b]")
        elif isinstance(bound, bool) or not isinstance(bound, int | float) or bound != bound:
            raise UserError(f"{key}.{name}={bound} must be a number")
    _check_order(f"{key}.min", conditions.get("min"), "max", conditions.get("max"))


def _check_order(key: str, low: float | None, other: str, high: float | None) -> None:
    if low is not None and high is not None and low > high:
        raise UserError(f"{key}={low} is above {other}={high}, so nothing would be left: exchange them")


def _same(value: Any, other: Any) -> bool:
    """Whether the value of a csv equals one of YAML: "2020" is 2020, and "True" is true."""
    if isinstance(value, str) == isinstance(other, str):
        return bool(value == other)
    text, thing = (value, other) if isinstance(value, str) else (other, value)
    if isinstance(thing, bool):
        return bool(text.strip().lower() == str(thing).lower())
    try:
        return bool(float(text) == thing)
    except ValueError:
        return False


def _size(record: Record) -> tuple[int, int]:
    if not record.images:
        raise SkipSample("image_absent", f"{record.key}: the filters need an image's size")
    return record.sizes[0] if record.sizes else image_size(record.images[0])


def _check_column(record: Record, columns: Mapping[str, Any], column: str, conditions: dict[str, Any]) -> None:
    value = columns.get(column)
    if value is None and column == "caption":
        value = record.answer
    elif value is None and column in ("width", "height"):
        value = _size(record)[column == "height"]
    if value is None:
        raise Filtered(f"{column}_absent", record.key)
    try:
        wanted = (
            ("min" not in conditions or float(value) >= conditions["min"])
            and ("max" not in conditions or float(value) <= conditions["max"])
            and ("in" not in conditions or any(_same(value, wanted) for wanted in conditions["in"]))
            and ("not_in" not in conditions or not any(_same(value, refused) for refused in conditions["not_in"]))
        )
    except (TypeError, ValueError, OverflowError):
        wanted = False
    if not wanted:
        raise Filtered(column, f"{record.key}: {reprlib.repr(value)}")
