"""`metrics.csv`, what a run logged: a row for each logged step, which counts the optimizer steps made."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = "metrics.csv"
STEP = "step"
TRAINING = ("train/", "perf/", "data/", "eval/")
"""Columns of a training step: in files of older versions its row has the number of steps made before it."""


def read_metrics(path: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """The columns but `step`, and step -> column -> text; of a value that was logged twice the last one counts.

    Files of older versions are read as if they had been written today. Their `step`, which is not their first column,
    is one less in the rows of a training step and of a validation right after one, and they have several rows for a
    step. A last line without an end is what a kill left of a row, and is not read.
    """
    if not path.is_file():
        return [], {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        written = file.read()
    reader = csv.DictReader(io.StringIO(written[: written.rfind("\n") + 1], newline=""))
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
    """Lines of the file."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=[STEP, *columns], restval="")
    if header:
        writer.writeheader()
    writer.writerows({STEP: step} | dict(values) for step, values in rows)
    return table.getvalue()
