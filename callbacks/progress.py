"""What a person watching a run wants to see: one bar, or a few plain lines where no one is watching."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from sphinx_pl.data.record import Batch
from sphinx_pl.stages import Stage


class Progress(L.Callback):
    """A bar in optimizer steps with loss, held-out losses and tokens/s; without a terminal, `lines` lines in all.

    Steps that were left out because their loss or gradients were not finite (`train/nonfinite_steps`) are told once
    there are any. Begins with the table of what trains. Only the first rank prints.

    Args:
        lines: how many progress lines a log file gets.
        console: where to print; standard output by default.
    """

    def __init__(self, lines: int = 10, console: Console | None = None) -> None:
        self.lines = lines
        self.console = console or Console()
        self._bar: Bar | None = None
        self._held_out: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, Stage)
            self.console.print(trainable_table(pl_module.name, pl_module.sphinx.trainable_table()))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started, self._first = time.perf_counter(), trainer.global_step
        if not (trainer.is_global_zero and self.console.is_terminal):
            return
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._bar.add_task(
            str(pl_module.name),
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            completed=trainer.global_step,
            metrics="",
        )
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not batch.window_end or not trainer.is_global_zero:
            return
        step, total = trainer.global_step, trainer.max_steps
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            # Metrics of step n are there when step n + 1 ends.
            if (step - 1) % trainer.log_every_n_steps == 0 or step == total:
                self._bar.update(self._task, metrics=self._summary(trainer))
        elif total > 0 and step * self.lines // total > (step - 1) * self.lines // total:
            left = (time.perf_counter() - self._started) / (step - self._first) * (total - step)
            summary = self._summary(trainer)
            # One line for one fact, however narrow a log's console claims to be.
            self.console.print(
                f"{pl_module.name}  {step}/{total}  {summary}  {_clock(left)} left", highlight=False, soft_wrap=True
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        prefix = "val/loss/"
        self._held_out = {
            name.removeprefix(prefix): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefix)
        }
        if self._bar is not None:
            self._bar.update(self._task, metrics=self._summary(trainer))

    def _summary(self, trainer: L.Trainer) -> str:
        metrics = trainer.callback_metrics
        parts = []
        if "train/loss" in metrics:
            parts.append(f"loss {float(metrics['train/loss']):.3f}")
        if self._held_out:
            parts.append("held out " + " ".join(f"{name} {loss:.3f}" for name, loss in self._held_out.items()))
        if "perf/tokens_per_s" in metrics:
            parts.append(f"{_short(float(metrics['perf/tokens_per_s']))} tokens/s")
        if left_out := float(metrics.get("train/nonfinite_steps", 0)):
            parts.append(f"{left_out:.0f} not finite")
        return "  ".join(parts)

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def trainable_table(stage: str, parts: list[tuple[str, int, int]]) -> Table:
    """Parameters that train and that do not, by part of the model; `parts` as `Sphinx.trainable_table` gives them."""
    table = Table(title=f"What trains in {stage}")
    table.add_column("part")
    table.add_column("trainable", justify="right")
    table.add_column("frozen", justify="right")
    rows = [*parts, ("all", sum(row[1] for row in parts), sum(row[2] for row in parts))]
    for name, trainable, frozen in rows:
        if name == "all":
            table.add_section()
        table.add_row(name, f"{trainable:,}" if trainable else "–", f"{frozen:,}" if frozen else "–")
    return table


def _short(value: float) -> str:
    """Three digits: 945, 12.3k, 4.56M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
