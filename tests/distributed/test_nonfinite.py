"""A step whose gradients are not finite changes nothing on any rank, and is counted."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from sphinx_pl.checkpoints.training import TrainingShards
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import Batch
from sphinx_pl.distributed.fsdp2 import Fsdp2
from sphinx_pl.distributed.zero import Zero3
from sphinx_pl.stages.stage import NonFiniteError
from tests.distributed.handmade import Samples, fit_written
from tests.ranks import on_ranks
from tests.stages.test_stage import ALL

ENGINES: dict[str, Any] = {
    "one process": None,
    "ddp": lambda: "ddp",
    "zero3": Zero3,
    "zero3 offloaded": lambda: Zero3(offload_optimizer="cpu", offload_parameters="cpu"),
    "fsdp2": lambda: Fsdp2(compute_dtype="fp32"),
}
ADAMW = {"kind": "adamw", "lr": 1e-3, "eps": 1e-6}


def spoiled(batch: Batch) -> Batch:
    """Return the batch with an infinite weight on the first target of its last sample."""
    weights = batch.weights.clone()
    row, column = (batch.weights > 0).nonzero()[-1].tolist()
    weights[row, column] = math.inf
    return dataclasses.replace(batch, weights=weights)


def batches(processor: Processor, folder: Path, ranks: int, bad: list[int]) -> list[list[Batch]]:
    """Return four micro-batches. Those of the last rank at `bad` are spoiled."""
    s = Samples(processor, folder)
    rows = [[s.batch(s.image(), s.text()) for _ in range(4)] for _ in range(ranks)]
    rows[-1] = [spoiled(batch) if i in bad else batch for i, batch in enumerate(rows[-1])]
    return rows


class Noted(L.Callback):
    """The log, the metrics, and the actions of ZeRO-3."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts: list[float] = []
        self.rates: list[float] = []
        self.skipped = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("sphinx_pl.stages.stage").addHandler(handler)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.counts.append(float(trainer.callback_metrics.get("train/nonfinite_steps", 0)))
        self.rates.append(float(trainer.callback_metrics["train/lr"]))
        self.skipped = getattr(trainer.model, "skipped_steps", -1)


def state(folder: Path, step: int) -> dict[str, Any]:
    """Return weights, moments and counters."""
    pieces = TrainingShards(folder / f"step-{step:08d}")
    tensors: dict[str, Any] = {name: pieces.read(name) for name in pieces.shapes}
    for kind in pieces.kinds():
        tensors |= {f"{kind}/{name}": pieces.read(name, kind=kind) for name in pieces.shapes if pieces.has(name, kind)}
    return tensors | {"steps": pieces.state()["optimizer_steps"]}


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    assert one.keys() == two.keys()
    return one["steps"] == two["steps"] and all(torch.equal(one[name], two[name]) for name in one if name != "steps")


def run(engine: str, of_ranks: list[list[Batch]], *args: Any, **options: Any) -> list[SimpleNamespace]:
    """Return what each rank noted."""

    def fit() -> SimpleNamespace:
        noted = Noted()
        strategy = ENGINES[engine]() if ENGINES[engine] else None
        fit_written(strategy, of_ranks, *args, parts=ALL, optim=ADAMW, callbacks=[noted], **options)
        return SimpleNamespace(lines=noted.lines, counts=noted.counts, rates=noted.rates, skipped=noted.skipped)

    return on_ranks(len(of_ranks), fit) if ENGINES[engine] else [fit()]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=pytest.mark.long) if name == "zero3 offloaded" else name for name in ENGINES],
)
def test_the_step_is_skipped_on_all_ranks_and_counted(
    engine: str, processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    of_ranks = batches(processor, sample_data, 2 if ENGINES[engine] else 1, bad=[1])
    bad_key = of_ranks[-1][1].keys[-1]
    noted = run(engine, of_ranks, processor, tmp_path / "run")
    for rank in noted:
        assert rank.counts == [0, 1, 1, 1]
        assert rank.rates[1] != rank.rates[2], "the schedule stands still"
        [line] = [line for line in rank.lines if "is skipped" in line]
        assert line.endswith(f": {bad_key}"), line
        assert rank.skipped == (1 if engine.startswith("zero3") else -1)
    states = {step: state(tmp_path / "run", step) for step in (1, 2, 3)}
    assert same(states[1], states[2])
    assert not same(states[2], states[3])
    assert all(torch.isfinite(value).all() for name, value in states[3].items() if name != "steps")
    # A run that resumes from the checkpoint after the bad step is the same run.
    rest = [batches[2:] for batches in of_ranks]
    resume = tmp_path / "run/step-00000002"
    resumed = run(engine, rest, processor, tmp_path / "again", resume=resume, max_steps=4)
    assert resumed[0].counts == [1, 1]
    assert same(state(tmp_path / "run", 4), state(tmp_path / "again", 4))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("engine", ["one process", pytest.param("zero3", marks=pytest.mark.long)])
def test_too_many_in_a_row_stop_the_run(engine: str, processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    of_ranks = batches(processor, sample_data, 2 if ENGINES[engine] else 1, bad=[1, 2, 3])

    def fit() -> str:
        strategy = ENGINES[engine]() if ENGINES[engine] else None
        with pytest.raises(NonFiniteError, match="3 steps in a row up to step 4") as error_info:
            fit_written(strategy, of_ranks, processor, tmp_path, parts=ALL, optim=ADAMW, max_nonfinite=2)
        return str(error_info.value)

    messages = on_ranks(2, fit) if ENGINES[engine] else [fit()]
    assert len(set(messages)) == 1
    assert len(messages[0].splitlines()) == 1
    # The last checkpoint holds the state before the bad steps.
    assert same(state(tmp_path, 1), state(tmp_path, 3))
