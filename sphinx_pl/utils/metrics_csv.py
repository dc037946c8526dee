"""Reads and writes `metrics.csv`, the log of a run. It has a row for each logged optimizer step."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = "metrics.csv"
STEP = "step"
TRAINING = ("train/", "perf/", "data/", "eval/")
"""Columns of a training step. Older versions wrote them with the number of the steps before it."""


def read_metrics(path: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """Return the columns other than `step`, and step -> column -> text.

    The last of several values counts.

    Files of older versions are read as if they were written today. Their `step` is not the first
    column. It is one too low in rows of a training step and of a validation right after one. They
    have several rows for one step. A last line without an end is the rest of a killed write, and is
    skipped.
    """
    if not path.is_file():
        return [], {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        content = file.read()
    reader = csv.DictReader(io.StringIO(content[: content.rfind("\n") + 1], newline=""))
    columns = [name for name in reader.fieldnames or [] if name != STEP]
    old = (reader.fieldnames or [STEP])[0] != STEP
    rows: dict[int, dict[str, str]] = {}
    trained = -1
    for row in reader:
        if not (row.get(STEP) or "").isdigit():
            continue
        values = {name: value for name in columns if (value := row.get(name))}
        step = int(row[STEP])
        if old and any(name.startswith(TRAINING) for name in values):
            trained = step
        step += old and step == trained
        rows.setdefault(step, {}).update(values)
    return columns, dict(sorted(rows.items()))


def as_text(columns: Sequence[str], rows: Iterable[tuple[int, Mapping[str, Any]]], header: bool = False) -> str:
    """Return the lines of the file that hold these rows."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=[STEP, *columns], restval="")
    if header:
        writer.writeheader()
    writer.writerows({STEP: step} | dict(values) for step, values in rows)
    return table.getvalue()
