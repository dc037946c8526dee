"""A data set's official files: where they lie and how they are read, for training (converters) and
for benchmarks."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError

_T = TypeVar("_T")

# What code meets in an entry that is not what it should be.
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
# What reading a damaged JSON file, or a damaged .gz of one, ends in.
_UNREADABLE = (ValueError, RecursionError, OSError, EOFError, zlib.error)


class AnnotationFiles(ABC):
    """Reads one data set's official files.

    Args:
        src: the folder that holds them, under their official names.
        split: one of `splits`.

    Raises:
        UserError: an unknown split.
    """

    name: ClassVar[str]
    """Its name on the command line."""
    title: ClassVar[str]
    url: ClassVar[str]
    """The page that the files come from, or that defines their format."""
    licence: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("train", "val")

    def __init__(self, src: Path, split: str) -> None:
        if split not in self.splits:
            raise UserError(f"{self.name} has no split '{split}': one of {', '.join(self.splits)}")
        self.src = src
        self.split = split
        self.skipped: Counter[str] = Counter()
        """Entries that are sound but not meant for training, by reason."""
        self.left_out: Counter[str] = Counter()
        """Parts of entries (a region, a line of text) that are not used although the rest is, by
        reason."""

    @abstractmethod
    def entries(self) -> Iterator[tuple[str, Any]]:
        """(key, what the files say) of each annotated thing; keys are unique and stable.

        Raises:
            UserError: a file is missing or is not what it should be as a whole.
        """

    @abstractmethod
    def records(self, key: str, entry: Any) -> Iterator[Record]:
        """The Records of one entry; their keys begin with `key`, image paths are relative to the
        images' root folder.

        Raises:
            SkipSample: the entry is of no use. Any of the errors of a missing or wrong value will
                do too.
        """

    def file(self, *names: str) -> Path:
        """The first of these files that is below `src`; releases differ in names."""
        for name in names:
            if (self.src / name).is_file():
                return self.src / name
        raise UserError(f"{self.name}: {self.src} has no {' or '.join(names)}: it is part of {self.url}")

    def json(self, *names: str) -> Any:
        """The contents of a JSON file, found as by `file`; one that ends in .gz is decompressed."""
        path = self.file(*names)
        try:
            return json.loads(_contents(path))
        except _UNREADABLE as error:
            raise UserError(f"{self.name}: {path} is not readable as JSON ({error}): download it again") from None

    def json_items(self, *names: str, of: str = "") -> Iterator[Any]:
        """The elements of a JSON file that is one long list, or of its list under the key `of`, one
        at a time.

        As objects, the largest files would take many times their size.
        """
        path = self.file(*names)
        try:
            text = _contents(path).decode("utf-8-sig")
            start = re.search(rf'"{of}"\s*:\s*\[' if of else r"\A\s*\[", text)
            if not start:
                raise ValueError(f"no list {of}".strip())
            decoder = json.JSONDecoder()
            separator = re.compile(r"\s*([,\]]?)\s*")
            at = separator.match(text, start.end())
            while at and at[1] != "]":
                value, end = decoder.raw_decode(text, at.end())
                yield value
                at = separator.match(text, end)
        except _UNREADABLE as error:
            raise UserError(f"{self.name}: {path} is not readable as JSON ({error}): download it again") from None

    def json_lines(self, *names: str) -> Iterator[tuple[int, Any]]:
        """(number, value) of each line of a jsonl file; a damaged line's value is None."""
        path = self.file(*names)
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError):
                        yield number, None

    def parts(self, parts: Iterable[Any], read: Callable[[Any], _T]) -> Iterator[_T]:
        """The results of `read` for each part of an entry that lists several.

        A part of which it raises SkipSample, or an error of a missing or wrong value, is counted in
        `left_out`. Records that ask for all parts need `all_parts`.
        """
        for part in parts:
            try:
                yield read(part)
            except SkipSample as bad:
                self.left_out[bad.reason] += 1
            except MALFORMED:
                self.left_out["part_malformed"] += 1

    def all_parts(self, parts: Iterable[Any], read: Callable[[Any], _T]) -> list[_T]:
        """As `parts`, for records that ask for all of them: without one of them the answer is
        wrong.

        Raises:
            SkipSample: part_left_out.
        """
        parts = list(parts)
        usable = list(self.parts(parts, read))
        if len(usable) < len(parts):
            raise SkipSample("part_left_out", f"{len(parts) - len(usable)} of {len(parts)} parts cannot be used")
        return usable

    def read(self) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        """(key, its records, or why it has none) of each entry.

        Raises:
            UserError: a file is missing or is not what it should be as a whole.
        """
        return self.guarded(self.entries(), self.records)

    def guarded(
        self, entries: Iterator[tuple[str, Any]], records: Callable[[str, Any], Iterable[Record]]
    ) -> Iterator[tuple[str, list[Record] | SkipSample]]:
        """As `read`, of other entries and with another reader."""
        keys: set[str] = set()
        try:
            for key, entry in entries:
                yield key, _records(key, entry, keys, records)
        except MALFORMED as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.name}: what {self.src} holds is not as {self.url} says ({reason})") from None


def _records(
    key: str, entry: Any, keys: set[str], records: Callable[[str, Any], Iterable[Record]]
) -> list[Record] | SkipSample:
    if key in keys:
        return SkipSample("duplicate_key", key)
    keys.add(key)
    try:
        return list(records(key, entry))
    except SkipSample as bad:
        return bad
    except MALFORMED as error:
        return SkipSample("entry_malformed", f"{key}: {type(error).__name__}: {error}")


def _contents(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        return file.read()
