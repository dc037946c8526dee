"""Official annotation files are converted into instruction files, which `kind: instructions` reads.

Each data set, or family of data sets, has one module here. Its `Converter` says where the files are
and turns one of their entries into Records. This module checks, counts and writes them.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from sphinx_pl.data.annotation_files import MALFORMED, AnnotationFiles
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.readers.instruction_json import to_entry, to_record
from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import whole_file, write_whole
from sphinx_pl.utils.registry import Registry

CONVERTERS: Registry[type[Converter]] = Registry("converter", "python -m sphinx_pl.cli.convert")
_EXAMPLES = 3


class Converter(AnnotationFiles):
    """A converter makes training records from a data set's official files."""

    tasks: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            CONVERTERS.register(cls.name, cls)


@dataclass
class Report:
    """The report of one conversion counts what became of the entries."""

    entries: int = 0
    records: Counter[str] = field(default_factory=Counter)  # by task
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, list[str]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)  # by reason: not for training
    left_out: Counter[str] = field(default_factory=Counter)  # by reason; these are parts of entries

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
    """Write all records to the jsonl file `out` and return the report.

    The report is also written beside it, to `out`.report.json. A record that its task cannot use is
    dropped and counted here, so that no run meets it.

    Args:
        limit: the number of entries after which the conversion stops.
        progress: a function that is called now and then with the number of entries read so far.

    Raises:
        UserError: `out` is not jsonl, the converter's files are wrong, or no record is left.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out={out} must end in .jsonl")
    report = Report()
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary, temporary.open("wb") as file:
        for key, result in converter.read():
            if report.entries == limit:
                break
            report.entries += 1
            if report.entries % 1000 == 0:
                progress(report.entries)
            try:
                if isinstance(result, SkipSample):
                    raise result
                for record in result:
                    check(record)
                lines = [json.dumps(to_entry(record), ensure_ascii=False).encode() + b"\n" for record in result]
            except SkipSample as bad:
                report.drop(bad.reason, bad.detail or key)
                continue
            except MALFORMED as error:
                report.drop("entry_malformed", f"{key}: {type(error).__name__}: {error}")
                continue
            file.writelines(lines)
            report.records.update(record.task for record in result)
        progress(report.entries)
        report.skipped, report.left_out = converter.skipped, converter.left_out
        if not report.records:
            reasons = dict(report.dropped + report.skipped) or "there is no entry"
            raise UserError(f"{converter.name}: no record in {converter.src} can be used ({reasons})")
    write_whole(out.with_name(out.name + ".report.json"), json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def id_of(thing: Any, name: str = "id") -> int | str | None:
    """Return what an entry has at `name`, or None if that is no id."""
    value = thing.get(name) if isinstance(thing, dict) else None
    return value if isinstance(value, int | str) else None


def checked(region: Region, image_size: tuple[tuple[int, int], ...]) -> Region:
    """Return the region if a task can write its box and its label.

    Raises:
        SkipSample: no task can write them. The exception holds the reason.
    """
    record = Record("", "reg", (ImageRef("image"),), image_size, regions=(region,))
    TASKS[record.task].turns(record, Coordinates())
    return region


def check(record: Record) -> None:
    """Check that a run can use the record.

    Its task can write it, its images lie below their root, and a run reads it as it is.

    Raises:
        SkipSample: one of these does not hold. The exception holds the reason.
    """
    for image in record.images:
        path = PurePosixPath(image.path)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise SkipSample("image_path", f"{record.key}: {image.path}")
    turns = TASKS[record.task].turns(to_record(to_entry(record), record.key, Path(), record.task), Coordinates())
    if not record.images and any("<image>" in turn.question for turn in turns):
        raise SkipSample("image_absent", f"{record.key} has a mark for an image but none")


for _module in pkgutil.iter_modules(__path__):
    if _module.name != "__main__":
        importlib.import_module(f"{__name__}.{_module.name}")
