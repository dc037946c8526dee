"""The common parts of readers of image-text pairs: files that form a pair, and its Record."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from sphinx_pl.data.readers.annotation import check_unicode
from sphinx_pl.data.readers.base import Part, Reader, Shard
from sphinx_pl.data.readers.filters import PairFilters
from sphinx_pl.data.readers.instruction_json import sizes
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError, suggest

MAX_KEY = 1000
"""The longest key in bytes. Every key of a shard takes as much memory as its longest one."""
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "mpo", "avif")
"""Extensions of images in lower case."""
TEXTS = ("txt", "text", "caption")
"""Extensions of captions."""
LOOKED_AT = 1000
"""The number of pairs of which one must have the column of a filter."""
_IMAGE, _TEXT, _JSON = range(3)
_SLOTS = dict.fromkeys(IMAGES, _IMAGE) | dict.fromkeys(TEXTS, _TEXT) | {"json": _JSON}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,15}")


class PairReader(Reader):
    """Reads pairs of an image and a text, and filters them.

    Args:
        filters: the keys of `PairFilters`.
    """

    def __init__(
        self, name: str, path: str | Sequence[str], task: str = "caption", filters: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(name, path)
        self.task = TASKS[task].name
        self.filters = build(PairFilters, filters or {}, f"data.sources.{name}.filters")

    def pair(
        self,
        key: str,
        image: ImageRef,
        caption: Any,
        columns: Mapping[str, Any],
        row: Mapping[str, Any] | None = None,
    ) -> Record:
        """The Record of a pair.

        Args:
            columns: the pair's annotation; all but caption, width and height become the record's
                meta.
            row: further values that filters look at.

        Raises:
            SkipSample: caption_empty, caption_not_utf8, size_malformed, or a reason of the filters.
        """
        if not isinstance(caption, str) or not caption.strip():
            raise SkipSample("caption_empty", key)
        check_unicode(caption, "caption", key)
        record = Record(
            key=key,
            task=self.task,
            images=(image,),
            sizes=sizes(columns.get("width"), columns.get("height"), key),
            answer=caption.strip(),
            meta={name: value for name, value in columns.items() if name not in ("caption", "width", "height")},
        )
        self.filters.check(record, {**(row or {}), **columns})
        return record

    def check_shard(self, shard: Shard) -> None:
        """Raises: UserError: no pair of the shard has a column that the filters ask for."""
        shard = shard.whole if isinstance(shard, Part) else shard
        assert isinstance(shard, PairShard)
        missing = self.filters.needed
        names: set[str] = set()
        looked_at = 0
        for index in range(min(len(shard), LOOKED_AT)):
            if not missing:
                return
            try:
                columns = shard.columns(index)
            except SkipSample:
                continue
            looked_at += 1
            names.update(columns)
            missing = {column: key for column, key in missing.items() if column not in columns}
        for column, key in missing.items() if looked_at else ():
            raise UserError(
                f"data.sources.{self.name}.{key}: none of the first {looked_at} pairs has a column '{column}': "
                f"{suggest(column, sorted(names)) if names else 'they have no columns'}"
            )


class PairShard(Shard):
    """A shard of pairs whose annotations can be read without their images."""

    def columns(self, index: int) -> Mapping[str, Any]:
        """The annotation of a pair: column -> value.

        Raises:
            SkipSample: it cannot be read.
        """
        raise NotImplementedError

    def images(self, index: int) -> object:
        return None  # each has its own


class Members:
    """Files by name -> samples: images with the text and the json of the same name.

    The files of a sample have one name up to the last dot. Files without a partner are then joined
    by the name up to the first dot, as in WebDataset (`a.img.jpg`, `a.cap.txt`), if that makes one
    pair. The text between the dots must be words or the image's extension (`a.jpg.json`), and no
    other pair may begin in the same way. Otherwise the text distinguishes samples.

    Args:
        shard: it counts the files that are in no pair, with an example of each reason.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._rows: dict[str, int] = {}
        self._spans = array("q")
        self._texts: dict[int, str] = {}  # row -> extension of its text, if it is not the usual one
        self._ambiguous: set[int] = set()
        self._last: str | None = None
        self._began = False  # in this run of files with one key
        self._repeated: set[int] | None = None  # slots of a sample whose key has been there

    def add(self, name: str, first: int, second: int) -> None:
        """Add a file.

        Args:
            first, second: the place of its contents; `second` is not negative.
        """
        key, extension = split_name(name)
        if key.rpartition("/")[2].startswith(".") or not key:
            return self._shard.leave("hidden", name)
        slot = _SLOTS.get(extension)
        if slot is None:
            return self._shard.leave(extension if _NAME.fullmatch(extension) else "other", name)
        if key != self._last:
            self._last, self._began, self._repeated = key, key not in self._rows, None
        row = self._rows.setdefault(key, len(self._rows))
        if 6 * row == len(self._spans):
            self._spans.extend([0, -1] * 3)
        if self._repeated is not None:
            return self._repeat(slot, name)
        at = 6 * row + 2 * slot
        if self._spans[at + 1] < 0:
            self._spans[at], self._spans[at + 1] = first, second
            if slot == _TEXT and extension != TEXTS[0]:
                self._texts[row] = extension
        elif slot == _TEXT and extension != self._texts.get(row, TEXTS[0]):
            self._shard.leave(extension, f"{name}: the image has another text")
        elif self._complete(row):
            self._repeated = {slot}
            self._shard.skip("duplicate_key", name)
        else:  # which of them belong together?
            self._ambiguous.add(row)
            self._repeated = {slot}
            if not self._began:
                self._shard.skip("duplicate_key", name)
        return None

    def _repeat(self, slot: int, name: str) -> None:
        assert self._repeated is not None
        if slot in self._repeated:
            self._repeated.clear()
            self._shard.skip("duplicate_key", name)
        self._repeated.add(slot)

    def _complete(self, row: int) -> bool:
        image, text, note = self._spans[6 * row + 1 : 6 * row + 6 : 2]
        return image >= 0 and (text >= 0 or note >= 0)

    def samples(self) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64]]:
        """Keys [n], and the places of image, text and json as `add` got them [n, 3, 2]; second is
        -1 for a missing file."""
        names = list(self._rows)
        keys: list[tuple[int, str]] = []
        lonely: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if row in self._ambiguous:
                self._shard.skip("duplicate_key", name)
            elif self._complete(row):
                keys.append((row, name))
            else:
                lonely.setdefault(_to_first_dot(name), []).append(row)
        paired = {_to_first_dot(name) for _, name in keys} if lonely else set()
        for base, rows in lonely.items():
            used = self._rows.get(base)
            beside_a_pair = used is not None and self._complete(used)
            named = all(_words_only(names[row].removeprefix(base)) for row in rows)
            if base not in paired and named and self._join(rows):
                keys.append((rows[0], base))
                continue
            for row in rows:
                self._lonely(row, names[row], beside_a_pair)
        keys.sort()
        kept = []
        encoded = []
        for row, name in keys:
            key = name.encode("utf-8", "surrogateescape")
            if len(key) > MAX_KEY:
                self._shard.skip("key_too_long", name[:100])
            else:
                kept.append(row)
                encoded.append(key)
        spans: npt.NDArray[np.int64] = np.array(self._spans, dtype=np.int64).reshape(-1, 3, 2)
        return np.array(encoded, dtype=np.bytes_), spans[np.array(kept, dtype=np.int64)]

    def _join(self, rows: Sequence[int]) -> bool:
        """Whether rows form one pair. If so, the first row holds it afterwards."""
        filled = [(row, slot) for row in rows for slot in range(3) if self._spans[6 * row + 2 * slot + 1] >= 0]
        slots = [slot for _, slot in filled]
        if len(set(slots)) < len(slots) or _IMAGE not in slots or len(slots) < 2:
            return False
        for row, slot in filled:
            place, target = 6 * row + 2 * slot, 6 * rows[0] + 2 * slot
            self._spans[target : target + 2] = self._spans[place : place + 2]
        return True

    def _lonely(self, row: int, key: str, beside_a_pair: bool) -> None:
        image, text, note = (size >= 0 for size in self._spans[6 * row + 1 : 6 * row + 6 : 2])
        if beside_a_pair:
            # WebDataset's further files of a sample: a.seg.png beside a.jpg and a.txt.
            kind = "image" if image else "text" if text else "json"
            self._shard.leave(f"further_{kind}", f"{key} beside {_to_first_dot(key)}")
        elif image:
            self._shard.skip("caption_absent", f"{key}: no .{', .'.join(TEXTS)} or .json beside the image")
        else:
            what = " and ".join(name for name, there in ((".txt", text), (".json", note)) if there)
            self._shard.skip("image_absent", f"{key}: no image beside the {what}")


def split_name(name: str) -> tuple[str, str]:
    """The key of a path, up to the last dot of the file's name, and the extension in lower case."""
    if name.startswith(".") or name.endswith("/") or any(part in name for part in ("//", "/.", "./")):
        name = str(PurePosixPath(name))
    folder, slash, name = name.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not dot:
        return f"{folder}{slash}{name}", ""
    return f"{folder}{slash}{stem}" if stem else f"{folder}{slash}.", extension.lower()


def _words_only(middle: str) -> bool:
    """Whether the text between a name's first and last dot consists of words such as extensions."""
    return all(_NAME.fullmatch(word) is not None for word in middle.lower().split(".")[1:])


def _to_first_dot(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def extensions(names: Iterable[str]) -> set[str]:
    """Those of files."""
    return {split_name(name)[1] for name in names}
