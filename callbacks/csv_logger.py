"""`metrics.csv` in the run folder, with a row for each logged step.

A resumed run continues the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from sphinx_pl.utils.files import write_whole
from sphinx_pl.utils.metrics_csv import METRICS, as_text, read_metrics


class RowWriter(ExperimentWriter):
    """Collects all values that are logged for a step, at different times, in one row.

    The last row stays open: later values of its step replace it in the file, in a single write. A
    new column replaces the whole file by a rename. So a kill leaves complete rows, and at most one
    incomplete row at the end.
    """

    def _check_log_dir_exists(self) -> None:
        """Read the columns of the file, where the base class would delete it."""
        self._path = Path(self.log_dir) / METRICS
        self._columns, rows = read_metrics(self._path)
        self._open: dict[int, dict[str, Any]] = {step: dict(rows[step]) for step in list(rows)[-1:]}
        # The offset of the open rows in the file; None means that the whole file must be written.
        self._begin: int | None = None

    def log_metrics(self, metrics_dict: Mapping[str, Tensor | float], step: int | None = None) -> None:
        assert step is not None
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics_dict.items()}
        self._open.setdefault(step, {}).update(values)

    def save(self) -> None:
        if not self._open:
            return
        new = {name for values in self._open.values() for name in values}.difference(self._columns)
        if new or self._begin is None or not self._path.is_file():
            self._columns = sorted(new.union(self._columns))
            before = {step: row for step, row in read_metrics(self._path)[1].items() if step not in self._open}
            text = as_text(self._columns, before.items(), header=True)
            write_whole(self._path, text + as_text(self._columns, self._open.items()))
            self._begin = len(text.encode())
        else:
            with self._path.open("r+b", buffering=0) as file:
                file.seek(self._begin)
                file.write(as_text(self._columns, self._open.items()).encode())
                file.truncate()
        *closed, last = self._open.items()
        self._begin += len(as_text(self._columns, closed).encode())
        self._open = dict([last])


class MetricsCSV(CSVLogger):
    """`metrics.csv` in `save_dir`: `step`, the number of optimizer steps, and the metrics in
    alphabetical order.

    Args:
        flush_every_n_steps: the file is written when the step is a multiple of this.
    """

    def __init__(self, save_dir: str, flush_every_n_steps: int = 10) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_every_n_steps)

    @property
    @rank_zero_experiment  # type: ignore[untyped-decorator]
    def experiment(self) -> RowWriter:
        if self._experiment is None:  # type: ignore[has-type]
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = RowWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        assert step is not None
        self.experiment.log_metrics(metrics, step)
        if step % self._flush_logs_every_n_steps == 0:
            self.save()


def forget_after(path: Path, step: int) -> None:
    """Remove the rows of steps after `step`, which a resumed run repeats.

    The file is replaced by a rename.
    """
    if path.is_file():
        columns, rows = read_metrics(path)
        remaining = [(number, row) for number, row in rows.items() if number <= step]
        write_whole(path, as_text(columns, remaining, header=True))
