"""Shows the progress of a run: a bar on a terminal, or a few plain lines in a log."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console

from sphinx_pl.data.schema import Batch
from sphinx_pl.stages import Stage
from sphinx_pl.utils.console import StepBar, Table, clock


class Progress(L.Callback):
    """A bar in optimizer steps with loss, tokens/s and held-out losses.

    Without a terminal it prints a few lines.

    The loss is the mean since the last log, and so is tokens/s. Held-out losses name the step after
    which they were measured. The remaining time assumes the mean speed so far. Skipped steps, whose
    loss or gradients were not finite (`train/nonfinite_steps`), are counted once there are any. The
    table of trainable parts comes first. The last line has the final held-out losses. Only the
    first rank prints.

    Args:
        lines: the number of progress lines in a log file, beside the last one with the final
            held-out losses.
        console: the console to print on; standard output by default.
    """

    def __init__(self, lines: int = 10, console: Console | None = None) -> None:
        self.lines = lines
        self.console = console or Console()
        self._bar: StepBar | None = None
        self._held_out: dict[str, float] = {}
        self._validated = self._told = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, Stage)
            self.console.print(trainable_table(pl_module.name, pl_module.sphinx.trainable_table()))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started, self._first = time.perf_counter(), trainer.global_step
        if not (trainer.is_global_zero and self.console.is_terminal):
            return
        self._bar = StepBar(console=self.console, refresh_per_second=4)
        self._task = self._bar.add_task(
            str(pl_module.name),
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            completed=trainer.global_step,
            notes=self._metrics(trainer),
            left=None,
        )
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not batch.ends_step or not trainer.is_global_zero:
            return
        step, total = trainer.global_step, trainer.max_steps
        left = (time.perf_counter() - self._started) / (step - self._first) * (total - step) if total > 0 else None
        if self._bar is not None:
            self._bar.update(self._task, completed=step, left=left)
            if step % trainer.log_every_n_steps == 0 or step == total:
                self._bar.update(self._task, notes=self._metrics(trainer))
        elif left is not None and step * self.lines // total > (step - 1) * self.lines // total:
            self._tell(trainer, pl_module, f"{clock(left)} left")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        prefix = "val/loss/"
        self._validated = trainer.global_step
        self._held_out = {
            name.removeprefix(prefix): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefix)
        }
        if self._bar is not None:
            self._bar.update(self._task, notes=self._metrics(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        # A validation comes after the line of its step.
        if trainer.is_global_zero and not self.console.is_terminal and self._validated > self._told:
            self._tell(trainer, pl_module, f"{clock(time.perf_counter() - self._started)} taken")

    def _tell(self, trainer: L.Trainer, pl_module: L.LightningModule, when: str) -> None:
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        parts = (str(pl_module.name), f"{trainer.global_step}{total}", *self._metrics(trainer), when)
        # Each fact stays on one line, however narrow a log's console claims to be.
        self.console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)
        self._told = self._validated

    def _metrics(self, trainer: L.Trainer) -> list[str]:
        metrics = trainer.callback_metrics
        parts = []
        if "train/loss" in metrics:
            parts.append(f"loss {float(metrics['train/loss']):.3f}")
        if "perf/tokens_per_s" in metrics:
            parts.append(f"{_short(float(metrics['perf/tokens_per_s']))} tokens/s")
        if skipped := float(metrics.get("train/nonfinite_steps", 0)):
            parts.append(f"{skipped:.0f} not finite")
        if self._held_out:
            parts.append(f"held out after step {self._validated}:")
            parts += [f"{name} {loss:.3f}" for name, loss in self._held_out.items()]
        return parts

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def trainable_table(stage: str, parts: list[tuple[str, int, int]]) -> Table:
    """Return a table of trainable and frozen parameters by part of the model, from
    `Sphinx.trainable_table`.
    """
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
    """Return the value with three digits: 945, 12.3k, 4.56M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
