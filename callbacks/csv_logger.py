"""Lightning's CSV logger, except that a resumed run goes on with the file instead of deleting it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from sphinx_pl.files import write_whole


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Called by the base class, which would delete the file here: read its columns instead."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """As the base class, but never with half a file: a kill leaves the old one."""
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        _replace(path, fieldnames, rows)


class MetricsCSV(CSVLogger):
    """`metrics.csv` in `save_dir`: a row for each logged step, columns in alphabetical order."""

    def __init__(self, save_dir: str, flush_every_n_steps: int = 10) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_every_n_steps)

    @property
    @rank_zero_experiment  # type: ignore[untyped-decorator]
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:  # type: ignore[has-type]
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment


def forget_after(path: Path, step: int) -> None:
    """Drop the rows of steps that a resumed run will make again: those at or after optimizer step `step`.

    A row's `step` is the number of steps finished before it was logged, so the last row to keep is `step - 1`.
    The file is replaced in one move.
    """
    if not path.is_file():
        return
    with path.open(newline="") as file:
        written = file.read()
    # A kill may have left half a row, which a reader could take for a whole one.
    reader = csv.DictReader(io.StringIO(written[: written.rfind("\n") + 1], newline=""))
    columns = reader.fieldnames or []
    kept = [row for row in reader if row["step"].isdigit() and int(row["step"]) < step]
    _replace(path, columns, kept)


def _replace(path: Path, columns: Sequence[str], rows: list[dict[str, str]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, table.getvalue())
