"""A run resumes with another number of ranks: its partitions are in the checkpoint, no sample is lost or repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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


def fit(module: DataModule, folder: Path, ranks: int, steps: int, resume: Path | None = None) -> list[str]:
    """Train up to step `steps`, and return the keys that all ranks trained on."""
    keys = folder / f"{ranks}-ranks-to-{steps}"
    keys.mkdir(parents=True)
    torch.manual_seed(0)
    stage = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=100)
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": ranks, "use_distributed_sampler": False}
    callbacks = [Keys(keys), ResumeCheckpoint(str(folder / "checkpoints"), every_n_steps=100)]
    run = trainer(folder, max_steps=steps, callbacks=callbacks, **(options if ranks > 1 else {}))
    run.fit(stage, module, ckpt_path=resume, weights_only=True)
    return sorted(key for path in keys.iterdir() for key in path.read_text().split("\n")[:-1])


@pytest.mark.timeout(180)
def test_two_ranks_then_one_then_two(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    expected = [fit(data(processor, sample_data, 1, partitions=2), straight / str(n), 1, n) for n in (3, 6, 9)]
    used_keys: list[str] = []
    for ranks, steps, whole in ((2, 3, expected[0]), (1, 6, expected[1]), (2, 9, expected[2])):
        resume = checkpoints(tmp_path / "checkpoints")[-1] if used_keys else None
        used_keys += fit(data(processor, sample_data, ranks), tmp_path, ranks, steps, resume)
        assert sorted(used_keys) == whole
    state = TrainingShards(checkpoints(tmp_path / "checkpoints")[-1]).state()["DataModule"]
    assert sorted(state["planner"]["partitions"]) == ["0", "1"]
