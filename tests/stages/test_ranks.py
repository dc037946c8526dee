"""Two ranks give the update of one: the step's weight is summed, and a rank without images runs the same modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.stages import Stage
from tests.conftest import tiny_model
from tests.stages.test_stage import ALL, OPTIM, datamodule, trainer

STEPS = 4


def fit(data: DataModule, tmp_path: Path, **options: Any) -> Stage:
    torch.manual_seed(0)
    stage = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=STEPS, val_names=["real", "text"])
    stage.configure_model()
    stage.configure_optimizers = lambda: torch.optim.SGD(stage.parameters(), lr=0.1)  # type: ignore[method-assign]
    trainer(tmp_path, max_steps=STEPS, **options).fit(stage, data)
    return stage


def images_by_rank(data: DataModule) -> list[tuple[int, int]]:
    """Images that each of two ranks has in each step."""
    planners = [data.planner(rank=rank, world_size=2) for rank in (0, 1)]
    steps = zip(*([p.plan() for _ in range(STEPS)] for p in planners), strict=True)
    return [tuple(sum(len(s.images) for row in w[0].rows for s in row) for w in ws) for ws in steps]  # type: ignore[misc]


@pytest.mark.timeout(120)
def test_two_ranks_update_as_one_process_does(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    shares = images_by_rank(datamodule(processor, sample_data, 1, text=2.0))
    assert any(0 in share for share in shares), f"every rank always had images, nothing is tested: {shares}"
    both = fit(
        datamodule(processor, sample_data, 1, text=2.0),
        tmp_path,
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=False,
    )
    alone = datamodule(processor, sample_data, 2, text=2.0)
    alone.mixing.partitions = 2  # as two ranks have
    one = fit(alone, tmp_path)
    torch.manual_seed(0)
    start = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=STEPS)
    start.configure_model()
    moved = 0.0
    for (name, a), b, c in zip(one.named_parameters(), both.parameters(), start.parameters(), strict=True):
        step = float((a - c).detach().abs().max())
        moved = max(moved, step)
        assert float((a - b).detach().abs().max()) <= 2e-3 * step + 1e-6, name
    assert moved > 1e-3
