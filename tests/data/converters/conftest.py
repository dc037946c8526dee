"""Small files in the official structures, which the tests write themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.converters import CONVERTERS, Report, convert
from sphinx_pl.data.readers import InstructionReader
from sphinx_pl.data.schema import Record

Run = Callable[..., tuple[list[Record], Report]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Writes files below a folder (str and bytes as they are, lists of lines as jsonl with `lines`, the rest as JSON),
    converts them and reads the result back as a training run would."""

    def run(name: str, files: dict[str, Any], split: str = "train") -> tuple[list[Record], Report]:
        src = tmp_path / "src"
        for place, content in files.items():
            path = src / place
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, str):
                path.write_text(content)
            elif path.suffix == ".jsonl":
                path.write_text(
                    "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in content)
                )
            else:
                path.write_text(json.dumps(content))
        out = tmp_path / "out.jsonl"
        report = convert(CONVERTERS[name](src, split), out)
        source = InstructionReader(name, str(out), root=".")
        read = [source.record(index) for index in range(len(source))]
        # The source puts the place in the file before the entry's own key.
        records = [dataclasses.replace(record, key=record.key.split(":", 2)[-1]) for record in read]
        assert len(records) == report.records.total()
        assert {record.task for record in records} <= set(CONVERTERS[name].tasks)
        return records, report

    return run
