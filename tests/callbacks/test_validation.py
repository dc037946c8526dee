"""Held-out losses before the first step and after the last one, each measured once, also in a
resumed run.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import LambdaCallback

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint, checkpoints, step_of
from sphinx_pl.callbacks.csv_logger import MetricsCSV
from sphinx_pl.callbacks.validation import ValidateAtEnds

Fit = Callable[..., tuple[L.Trainer, Any]]


class Losses(L.Callback):
    """Step -> held-out loss of every validation."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert trainer.global_step not in self.losses, "a step was validated twice"
        self.losses[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


def written(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (4, 2, [0, 2, 4]),  # the interval ends with the run, so only once
        (3, 2, [0, 2, 3]),
        (3, 100, [0, 3]),
        (1, 1, [0, 1]),
    ],
)
def test_before_the_first_step_and_after_the_last(
    steps: int, every: int, expected: list[int], fit: Fit, tmp_path: Path
) -> None:
    losses = Losses()
    _, stage = fit([ValidateAtEnds(), losses], [MetricsCSV(str(tmp_path), 1)], steps, val_check_interval=2 * every)
    assert list(losses.losses) == expected
    assert len(set(losses.losses.values())) == len(expected)
    assert written(tmp_path) == pytest.approx(list(losses.losses.values()))
    assert stage.last_value("val/loss") == pytest.approx(losses.losses[steps])


def test_the_one_before_training_does_not_change_it(fit: Fit, tmp_path: Path) -> None:
    runs = []
    for name, callbacks in (("with", [ValidateAtEnds()]), ("without", [])):
        numbers: list[float] = []
        note = LambdaCallback(
            on_train_batch_end=lambda _, __, outputs, *___, g=numbers: g.append(float(outputs["loss"]))
        )
        fit([*callbacks, note], [MetricsCSV(str(tmp_path / name), 1)], steps=3)
        runs.append(numbers)
    assert runs[0] == runs[1]


def test_a_resumed_run_repeats_no_validation_and_skips_none(fit: Fit, tmp_path: Path) -> None:
    own = tmp_path / "checkpoints"

    def run(resume: Path | None = None) -> dict[int, float]:
        losses = Losses()
        fit([ValidateAtEnds(), losses, ResumeCheckpoint(str(own), every_n_steps=1, keep=9)], steps=5, resume=resume)
        return losses.losses

    straight = run()
    assert list(straight) == [0, 2, 4, 5]
    for step, expected in ((3, [4, 5]), (4, [5]), (5, [])):
        result = run(own / f"step-0000000{step}")
        assert result == {step: straight[step] for step in expected}


def test_the_last_checkpoint_comes_after_the_last_validation(fit: Fit, tmp_path: Path) -> None:
    """A run killed in between would have nothing left to train, and so would never validate."""
    notes: list[tuple[int, list[int]]] = []

    def note(trainer: L.Trainer, *_: Any) -> None:
        notes.append((trainer.global_step, [step_of(path) for path in checkpoints(tmp_path)]))

    callback = LambdaCallback(on_validation_start=note)
    fit([callback, ValidateAtEnds(), ResumeCheckpoint(str(tmp_path), every_n_steps=1, keep=9)], steps=3)
    assert notes == [(0, []), (2, [1]), (3, [1, 2])]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1, 2, 3]


def test_without_held_out_data_there_is_nothing_to_do(fit: Fit, tmp_path: Path) -> None:
    started: list[Any] = []
    callback = LambdaCallback(on_validation_start=lambda *args: started.append(args))
    trainer, _ = fit([callback, ValidateAtEnds()], steps=2, limit_val_batches=0)
    assert trainer.global_step == 2
    assert not started
