"""Readers: a reader knows the files (shards) of a source, and an opened shard is a numbered list of
records.

Nothing is opened before it is needed, so a source of a hundred thousand shards starts as fast as
one of three. An opened shard holds offsets, not contents. A record is the few bytes of its
annotation; its image is not decoded.
"""

from __future__ import annotations

import glob
import inspect
import math
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sphinx_pl.data.files import is_remote, patiently
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.registry import Registry

MAX_FILES = 10_000_000
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


class Shard(ABC):
    """The records of one file. Everything else in the file is counted when it is opened."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        """Reason -> count of entries that cannot be used."""
        self.unused: Counter[str] = Counter()
        """Name -> count of what is no entry, or is not asked for, such as other files."""
        self.examples: dict[str, str] = {}
        """`skipped/<reason>` or `unused/<name>` -> the first thing that it counted, in words."""

    def skip(self, reason: str, example: str) -> None:
        """Count an entry that cannot be used."""
        self.skipped[reason] += 1
        self.examples.setdefault(f"skipped/{reason}", example)

    def leave(self, name: str, example: str) -> None:
        """Count something that is no entry."""
        self.unused[name] += 1
        self.examples.setdefault(f"unused/{name}", example)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, index: int) -> Record:
        """The record at `index`, 0 <= index < len(self); no image is decoded.

        Raises:
            SkipSample: the record is broken, or the filters exclude it.
        """

    @abstractmethod
    def images(self, index: int) -> object:
        """A value that records about the same images share; None if the record is alone."""


class Reader(ABC):
    """The files of a source, of one kind, and the records in them.

    Args:
        name: the source's name in configurations, counters and keys.
        path: a file, a glob, a brace range as in WebDataset (`{000..003}`, `{a,b}`),
            `pipe:COMMAND`, a URL that fsspec can read, or a list of these. A file of exactly this
            name comes first.

    Raises:
        UserError: there is no file.
    """

    folders = False
    """Whether the files of this reader are folders."""
    part = ""
    """train: all records but a fixed tenth; held_out: that tenth; "": all records."""

    def __init__(self, name: str, path: str | Sequence[str]) -> None:
        self.name = name
        self.urls = expand_paths(name, path, self.folders)
        self.shard_names = short_names(self.urls)

    def open(self, number: int) -> Shard:
        """Shard `number`.

        Raises:
            SkipSample: it cannot be read; the reason is shard_missing, after several attempts, or
                names the fault.
        """
        url = self.urls[number]
        try:
            shard = patiently(url, lambda: self._open(number))
            return Part(shard, self.part) if self.part else shard
        except OSError as error:
            raise SkipSample("shard_missing", f"{url}: {error.strerror}") from None

    @abstractmethod
    def _open(self, number: int) -> Shard:
        """Shard `number`. An OSError means that another attempt may succeed."""

    def count(self, number: int) -> int | None:
        """The number of records of shard `number`; None if it is unknown without opening the shard."""
        return None

    def size(self, probe: int = 16) -> tuple[int, bool]:
        """The number of records, and whether it was counted or extrapolated from `probe` shards."""
        numbers = spread(len(self.urls), probe)
        counts = []
        for number in numbers:
            if self.part or (count := self.count(number)) is None:
                try:
                    count = len(self.open(number))
                except SkipSample:
                    count = 0
            counts.append(count)
        return sum(counts) * len(self.urls) // len(numbers), len(numbers) == len(self.urls)

    # All shards as one list: held-out sets and evaluation need a whole source.

    @cached_property
    def _all(self) -> tuple[list[Shard], list[int], Counter[str]]:
        shards: list[Shard] = []
        skipped: Counter[str] = Counter()
        for number in range(len(self.urls)):
            try:
                shards.append(self.open(number))
                skipped.update(shards[-1].skipped)
            except SkipSample as bad:
                skipped[bad.reason] += 1
        ends = np.cumsum([len(shard) for shard in shards]).tolist()
        if not shards or not ends[-1]:
            files = self.urls[0] + (" and the like" if len(self.urls) > 1 else "")
            unused = sum((shard.unused for shard in shards), Counter[str]())
            why = dict(skipped + Counter({f"unused/{name}": count for name, count in unused.items()}))
            raise UserError(
                f"source '{self.name}': no usable sample in {files}{self.hint()} ({why or 'nothing in it'})"
            )
        return shards, ends, skipped

    def hint(self) -> str:
        """The options that may be the reason why no record is left, in words."""
        return ""

    def folder_hint(self, key: str) -> str:
        """A hint at the folder that image paths are relative to, for readers of annotations; "" for
        others.

        Args:
            key: of the source in the configuration, to name its options.
        """
        return ""

    def check_shard(self, shard: Shard) -> None:  # noqa: B027 - most have nothing to check
        """Check that a shard has what the options ask for.

        Raises:
            UserError: it does not.
        """

    def __len__(self) -> int:
        return int(self._all[1][-1])

    def record(self, index: int) -> Record:
        """The record at `index` of all shards one after another.

        Raises:
            SkipSample: the record is broken, or the filters exclude it.
        """
        shards, ends, _ = self._all
        number = int(np.searchsorted(ends, index, side="right"))
        return shards[number].record(index - ends[number] + len(shards[number]))

    @property
    def skipped(self) -> Counter[str]:
        """Reason -> count of what was unreadable when the shards were opened."""
        return self._all[2]


class Part(Shard):
    """A tenth of a shard's records, or all other records. Records about the same images are in one
    part.

    Args:
        part: train or held_out.
    """

    def __init__(self, whole: Shard, part: str) -> None:
        super().__init__()
        self.whole = whole
        self.skipped, self.unused, self.examples = whole.skipped, whole.unused, whole.examples
        groups: dict[object, list[int]] = {}
        for index in range(len(whole)):
            images = whole.images(index)
            groups.setdefault(index if images is None else ("images", images), []).append(index)
        order = sorted(groups, key=lambda group: zlib.crc32(repr(group).encode("utf-8", "backslashreplace")))
        held_out = len(order) // 10 or int(len(order) > 1)
        chosen = order[:held_out] if part == "held_out" else order[held_out:]
        self.rows = sorted(index for group in chosen for index in groups[group])

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        return self.whole.record(self.rows[index])

    def images(self, index: int) -> object:
        return self.whole.images(self.rows[index])


READERS: Registry[type[Reader]] = Registry("source kind")


def config_key(name: str, section: str = "sources") -> str:
    """The key of a source in the configuration. A member of a group is called `group.member`."""
    return f"data.{section}.{name.replace('.', '.sources.')}"


def listed(value: Sequence[str], key: str) -> frozenset[str]:
    """The names in a setting that is a list of them.

    Raises:
        UserError: the setting is a text, whose letters would count as names.
    """
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{key}={value} must be a list of names, such as [{value if isinstance(value, str) else 'a'}]")
    return frozenset(value)


def build_reader(kind: str, name: str, path: str | Sequence[str], **options: Any) -> Reader:
    """The reader of the registered `kind` for a source.

    Raises:
        UserError: the kind or an option is unknown, or there is no file.
    """
    check_options(kind, f"source '{name}'", options)
    return READERS[kind](name, path, **options)


def check_options(kind: str, where: str, options: Iterable[str]) -> None:
    """Check that readers of `kind` have these options, without building one.

    Raises:
        UserError: the kind or an option is unknown; the message begins with `where`.
    """
    names = [option for option in inspect.signature(READERS[kind]).parameters if option not in ("name", "path")]
    for option in options:
        if option not in names:
            raise UserError(f"{where} of kind {kind} has no option '{option}': {suggest(option, names)}")


def spread(length: int, at_most: int | None) -> list[int]:
    """At most `at_most` of `length` indices, spread evenly, since a file's first entries are often
    of one kind."""
    count = min(length, at_most or length)
    return [i * length // count for i in range(count)]


def expand_paths(name: str, path: str | Sequence[str], folders: bool = False) -> list[str]:
    """The files of a path setting, sorted for each pattern. Every pattern must match something.

    Args:
        folders: whether the setting names folders.
    """
    there = os.path.isdir if folders else os.path.isfile
    urls: list[str] = []
    patterns = [path] if isinstance(path, str) else path
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"source '{name}': path={path} must be a path, a pattern, or a list of these")
    for pattern in patterns:
        if is_remote(pattern):
            urls += _expand_braces(pattern)
            continue
        whole = os.path.expanduser(pattern)  # noqa: PTH111 - pathlib's raises
        for single in [whole] if there(whole) else _expand_braces(whole):
            # `os.path` is used for the same reason: a name of any length or content is no file, and
            # no error.
            matches = [single]
            if not os.path.exists(single):  # noqa: PTH110
                matches = sorted(glob.glob(single, recursive=True))  # noqa: PTH207
            matches = [match for match in matches if there(match)]
            if not matches:
                raise UserError(
                    f"source '{name}': there is no {'folder' if folders else 'file'} '{single:.500}': correct its path "
                    "(the sample data's are made by `python -m sphinx_pl.cli.sample`)"
                )
            urls += matches
    if not urls:
        raise UserError(f"source '{name}' has an empty list of paths: name at least one file")
    return urls


def _expand_braces(pattern: str) -> Iterator[str]:
    """`a{008..010}` -> a008, a009, a010; `a{x,y}` -> ax, ay."""
    if (count := math.prod(map(_choices, _BRACES.finditer(pattern)))) > MAX_FILES:
        raise UserError(f"the path {pattern:.200} stands for {count} files, which cannot be")
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, choices = match.groups()
    middles = choices.split(",") if choices else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    for middle in middles:
        for rest in _expand_braces(pattern[match.end() :]):
            yield f"{pattern[: match.start()]}{middle}{rest}"


def _choices(match: re.Match[str]) -> int:
    first, last, choices = match.groups()
    if choices:
        return int(choices.count(",")) + 1
    return max(int(last[:18]) - int(first[:18]) + 1, 0) if len(last) <= 18 else MAX_FILES + 1


def short_names(urls: Sequence[str]) -> list[str]:
    """Unique names of the files that survive a move: paths below the common folder."""
    # Names become part of keys, which are text. A file's name is bytes.
    return [name.encode("utf-8", "backslashreplace").decode() for name in _short_names(urls)]


def _short_names(urls: Sequence[str]) -> list[str]:
    if any(map(is_remote, urls)):
        # The whole path parts and words that differ between the URLs.
        common = os.path.commonprefix(urls) if len(set(urls)) > 1 else urls[0].rstrip(" -")  # noqa: RUF071
        begin = max(common.rfind("/"), common.rfind(" "), common.rfind(":")) + 1
        end = os.path.commonprefix([url[begin:][::-1] for url in urls])[::-1]  # noqa: RUF071
        tail = len(end) - end.find(" ") if " " in end else 0  # ` -` of a command
        return [url[begin : len(url) - tail] for url in urls]
    absolute = [Path(url).absolute() for url in urls]
    folder = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(folder).as_posix() for path in absolute]
