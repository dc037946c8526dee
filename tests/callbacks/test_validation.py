"""Held-out losses before the first step and after the last one: each once, also where a run is resumed."""

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


class Seen(L.Callback):
    """Step -> held-out loss, of every validation."""

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
        (4, 2, [0, 2, 4]),  # the interval ends with the run: not twice
        (3, 2, [0, 2, 3]),
        (3, 100, [0, 3]),
        (1, 1, [0, 1]),
    ],
)
def test_before_the_first_step_and_after_the_last(
    steps: int, every: int, expected: list[int], fit: Fit, tmp_path: Path
) -> None:
    seen = Seen()
    _, stage = fit([ValidateAtEnds(), seen], [MetricsCSV(str(tmp_path), 1)], steps, val_check_interval=2 * every)
    assert list(seen.losses) == expected
    assert len(set(seen.losses.values())) == len(expected)
    assert written(tmp_path) == pytest.approx(list(seen.losses.values()))
    assert stage.last_value("val/loss") == pytest.approx(seen.losses[steps])


def test_the_one_before_training_does_not_change_it(fit: Fit, tmp_path: Path) -> None:
    runs = []
    for name, callbacks in (("with", [ValidateAtEnds()]), ("without", [])):
        given: list[float] = []
        note = LambdaCallback(on_train_batch_end=lambda _, __, outputs, *___, g=given: g.append(float(outputs["loss"])))
        fit([*callbacks, note], [MetricsCSV(str(tmp_path / name), 1)], steps=3)
        runs.append(given)
    assert runs[0] == runs[1]


def test_a_run_that_goes_on_repeats_none_and_leaves_none_out(fit: Fit, tmp_path: Path) -> None:
    own = tmp_path / "checkpoints"

    def run(resume: Path | None = None) -> dict[int, float]:
        seen = Seen()
        fit([ValidateAtEnds(), seen, ResumeCheckpoint(str(own), every_n_steps=1, keep=9)], steps=5, resume=resume)
        return seen.losses

    straight = run()
    assert list(straight) == [0, 2, 4, 5]
    for step, expected in ((3, [4, 5]), (4, [5]), (5, [])):
        found = run(own / f"step-0000000{step}")
        assert found == {step: straight[step] for step in expected}


def test_the_last_checkpoint_comes_after_the_last_validation(fit: Fit, tmp_path: Path) -> None:
    """A run that was killed in between would have nothing left to train, and so never validate."""
    found: list[tuple[int, list[int]]] = []

    def note(trainer: L.Trainer, *_: Any) -> None:
        found.append((trainer.global_step, [step_of(path) for path in checkpoints(tmp_path)]))

    seen = LambdaCallback(on_validation_start=note)
    fit([seen, ValidateAtEnds(), ResumeCheckpoint(str(tmp_path), every_n_steps=1, keep=9)], steps=3)
    assert found == [(0, []), (2, [1]), (3, [1, 2])]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1, 2, 3]


def test_without_held_out_data_there_is_nothing_to_do(fit: Fit, tmp_path: Path) -> None:
    started: list[Any] = []
    seen = LambdaCallback(on_validation_start=lambda *args: started.append(args))
    trainer, _ = fit([seen, ValidateAtEnds()], steps=2, limit_val_batches=0)
    assert trainer.global_step == 2
    assert not started
