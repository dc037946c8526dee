"""Official annotation files -> Records, as the instruction files that `kind: instructions` reads.

One module here for each data set or family of them. Its `Converter` says where its files are and turns one of their
entries into Records; checking, counting and writing are this module's.
"""

from __future__ import annotations

import gzip
import importlib
import json
import pkgutil
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.entries import to_entry, to_record
from sphinx_pl.data.geometry import Geometry
from sphinx_pl.data.record import ImageRef, Record, Region
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.errors import UserError
from sphinx_pl.files import whole_file, write_whole
from sphinx_pl.registry import Registry

CONVERTERS: Registry[type[Converter]] = Registry("converter")
_EXAMPLES = 3
_T = TypeVar("_T")

# What code meets in an entry that is not what it should be.
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
# What reading a damaged JSON file, or a damaged .gz of one, ends in.
_UNREADABLE = (ValueError, RecursionError, OSError, EOFError, zlib.error)


class Converter(ABC):
    """Reads one data set's official files.

    Args:
        src: the folder that holds them, under their official names.
        split: one of `splits`.

    Raises:
        UserError: an unknown split.
    """

    name: ClassVar[str]
    """What the command line calls it."""
    title: ClassVar[str]
    url: ClassVar[str]
    """The page that the files come from, or that defines their format."""
    licence: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    splits: ClassVar[tuple[str, ...]] = ("train", "val")

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            CONVERTERS.register(cls.name, cls)

    def __init__(self, src: Path, split: str) -> None:
        if split not in self.splits:
            raise UserError(f"{self.name} has no split '{split}': one of {', '.join(self.splits)}")
        self.src = src
        self.split = split
        self.skipped: Counter[str] = Counter()
        """Entries that are not meant for training as they stand, by reason: nothing is wrong with them."""
        self.left_out: Counter[str] = Counter()
        """Parts of entries (a region, a line of text) that are not used although the rest is, by reason."""

    @abstractmethod
    def entries(self) -> Iterator[tuple[str, Any]]:
        """(key, what the files say) of each annotated thing; keys are unique and stable.

        Raises:
            UserError: a file is missing or is not what it should be as a whole.
        """

    @abstractmethod
    def records(self, key: str, entry: Any) -> Iterator[Record]:
        """The Records of one entry; their keys begin with `key`, image paths are relative to the images' root folder.

        Raises:
            BadSample: the entry is of no use. Any of the errors of a missing or wrong value will do too.
        """

    def file(self, *names: str) -> Path:
        """The first of these files below `src` that is there (a dataset's releases differ in names)."""
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
            raise UserError(f"{self.name}: {path} is not readable as JSON ({error}): get it anew") from None

    def json_items(self, *names: str, of: str = "") -> Iterator[Any]:
        """The elements of a JSON file that is one long list, or of its list under the key `of`, one at a time.

        As objects, the largest files would take many times their size.
        """
        path = self.file(*names)
        try:
            text = _contents(path).decode()
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
            raise UserError(f"{self.name}: {path} is not readable as JSON ({error}): get it anew") from None

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
        """What `read` makes of each part of an entry that lists several.

        A part of which it raises BadSample, or an error of a missing or wrong value, is counted in `left_out`.
        """
        for part in parts:
            try:
                yield read(part)
            except BadSample as bad:
                self.left_out[bad.reason] += 1
            except _MALFORMED:
                self.left_out["part_malformed"] += 1


@dataclass
class Report:
    """What became of the entries of one conversion."""

    entries: int = 0
    records: Counter[str] = field(default_factory=Counter)  # by task
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, list[str]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)  # by reason: not meant for training
    left_out: Counter[str] = field(default_factory=Counter)  # by reason: parts of entries that were used

    def drop(self, reason: str, detail: str) -> None:
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(detail[:200].encode("utf-8", "replace").decode())

    def to_dict(self) -> dict[str, Any]:
        return {
            "entries": self.entries,
            "records": dict(self.records),
            "dropped": {
                reason: {"count": count, "examples": self.examples[reason]}
                for reason, count in self.dropped.most_common()
            },
            "skipped": dict(self.skipped),
            "left_out": dict(self.left_out),
        }


def convert(
    converter: Converter, out: Path, limit: int | None = None, progress: Callable[[int], None] = lambda done: None
) -> Report:
    """Write all records to the jsonl file `out`, and what became of the entries to `out`.report.json beside it.

    What the records' tasks cannot use is dropped and counted here, not when a run meets it.

    Args:
        limit: stop after so many entries.
        progress: called with the number of entries read so far, now and then.

    Raises:
        UserError: `out` is not jsonl, the converter's files are wrong, or no record is left.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out={out} must end in .jsonl")
    report = Report()
    seen: set[str] = set()
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary, temporary.open("wb") as file:
        for key, entry in _entries(converter):
            if report.entries == limit:
                break
            report.entries += 1
            if report.entries % 1000 == 0:
                progress(report.entries)
            try:
                if key in seen:
                    raise BadSample("duplicate_key", key)
                seen.add(key)
                records = list(converter.records(key, entry))
                for record in records:
                    check(record)
                lines = [json.dumps(to_entry(record), ensure_ascii=False).encode() + b"\n" for record in records]
            except BadSample as bad:
                report.drop(bad.reason, bad.detail or key)
                continue
            except _MALFORMED as error:
                report.drop("entry_malformed", f"{key}: {type(error).__name__}: {error}")
                continue
            file.writelines(lines)
            report.records.update(record.task for record in records)
        progress(report.entries)
        report.skipped, report.left_out = converter.skipped, converter.left_out
        if not report.records:
            reasons = dict(report.dropped + report.skipped) or "there is no entry"
            raise UserError(f"{converter.name}: no record in {converter.src} can be used ({reasons})")
    write_whole(out.with_name(out.name + ".report.json"), json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _entries(converter: Converter) -> Iterator[tuple[str, Any]]:
    try:
        yield from converter.entries()
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{converter.name}: what {converter.src} holds is not as {converter.url} says ({reason})"
        ) from None


def _contents(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        return file.read()


def id_of(thing: Any, name: str = "id") -> int | str | None:
    """What a thing says is its `name`; None where that is no id."""
    value = thing.get(name) if isinstance(thing, dict) else None
    return value if isinstance(value, int | str) else None


def checked(region: Region, image_size: tuple[tuple[int, int], ...]) -> Region:
    """The region, if a task can write its box and its label.

    Raises:
        BadSample: why not.
    """
    record = Record("", "reg", (ImageRef("image"),), image_size, regions=(region,))
    TASKS[record.task].turns(record, Geometry())
    return region


def check(record: Record) -> None:
    """Whether the record's task can write it, its images lie below their root and a run will read it as it is.

    Raises:
        BadSample: why not.
    """
    for image in record.images:
        path = PurePosixPath(image.path)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise BadSample("image_path", f"{record.key}: {image.path}")
    turns = TASKS[record.task].turns(to_record(to_entry(record), record.key, Path(), record.task), Geometry())
    if not record.images and any("<image>" in turn.question for turn in turns):
        raise BadSample("image_absent", f"{record.key} has a mark for an image but none")


for _module in pkgutil.iter_modules(__path__):
    if _module.name != "__main__":
        importlib.import_module(f"{__name__}.{_module.name}")
