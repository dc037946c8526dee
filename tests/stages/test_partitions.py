"""A run resumes with another number of ranks: its partitions are in the checkpoint, no sample is lost or repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint, checkpoints
from sphinx_pl.checkpoints.training import TrainingShards
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.stages import Stage
from tests.conftest import tiny_model
from tests.stages.test_end_of_data import Keys
from tests.stages.test_stage import ALL, OPTIM, trainer

ROWS = 8  # of an optimizer step, on all ranks together


def data(processor: Processor, folder: Path, ranks: int, partitions: int | None = None) -> DataModule:
    sources = {
        "real": {"kind": "image_text", "path": str(folder / "real/train-*.tar")},
        "text": {"kind": "text", "path": str(folder / "text/train.jsonl"), "weight": 0.3},
    }
    packing = {"row_length": 96, "micro_batch_rows": ROWS // ranks}
    return DataModule(processor, sources, {}, packing, mixing={"partitions": partitions}, workers=1)


def trained_on(folder: Path) -> list[str]:
    return sorted(key for path in folder.iterdir() for key in path.read_text().split("\n")[:-1])


def fit(
    module: DataModule, folder: Path, ranks: int, steps: int, resume: Path | None = None, *more: L.Callback
) -> list[str]:
    """Train up to step `steps`, and return the keys that all ranks trained on."""
    keys = folder / f"{ranks}-ranks-to-{steps}"
    keys.mkdir(parents=True)
    torch.manual_seed(0)
    stage = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=100)
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": ranks, "use_distributed_sampler": False}
    callbacks = [Keys(keys), *more, ResumeCheckpoint(str(folder / "checkpoints"), every_n_steps=100)]
    run = trainer(folder, max_steps=steps, callbacks=callbacks, **(options if ranks > 1 else {}))
    run.fit(stage, module, ckpt_path=resume, weights_only=True)
    return trained_on(keys)


@pytest.mark.timeout(180)
def test_two_ranks_then_one_then_two(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    expected: dict[int, list[str]] = {}

    def note(trainer: L.Trainer, *_: Any) -> None:
        expected[trainer.global_step] = trained_on(straight / "1-ranks-to-9")

    fit(data(processor, sample_data, 1, partitions=2), straight, 1, 9, None, LambdaCallback(on_train_batch_end=note))
    used_keys: list[str] = []
    for ranks, steps in ((2, 3), (1, 6), (2, 9)):
        resume = checkpoints(tmp_path / "checkpoints")[-1] if used_keys else None
        used_keys += fit(data(processor, sample_data, ranks), tmp_path, ranks, steps, resume)
        assert sorted(used_keys) == expected[steps]
    state = TrainingShards(checkpoints(tmp_path / "checkpoints")[-1]).state()["DataModule"]
    assert sorted(state["planner"]["partitions"]) == ["0", "1"]
