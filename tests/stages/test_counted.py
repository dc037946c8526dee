"""Losses and targets by task and by source count the samples of a step, on any number of ranks."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.stages import Stage
from tests.conftest import tiny_model
from tests.stages.test_stage import ALL, OPTIM, datamodule, trainer


def expected(processor: Processor, folder: Path, partitions: int) -> dict[str, float]:
    """Return what the first step of two micro-batches of four rows logs, from each sample alone."""
    data = datamodule(processor, folder, rows=8)
    data.mixing.partitions = partitions
    samples = [sample for micro in data.planner().plan() for row in micro.rows for sample in row]
    torch.manual_seed(0)
    stage = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=1)
    stage.configure_model()
    model = stage.sphinx
    sums: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for sample in samples:
        nll = model.token_losses(Collator(96, processor.image_size)([[sample]])).nll
        task = sample.questions[0].task
        for name in (f"task/{task}", f"source/{sample.source}"):
            sums[name] += float(nll.detach().sum())
            targets[name] += sum(sum(question.supervised[1:]) for question in sample.questions)
    assert {"source/real", "source/text", "task/text"} <= set(targets)
    losses = {f"train/loss_{name}": sums[name] / targets[name] for name in targets}
    return losses | {f"train/targets_{name}": float(count) for name, count in targets.items()}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_task_and_source_has_its_loss_and_its_targets(
    processor: Processor, sample_data: Path, tmp_path: Path, ranks: int
) -> None:
    torch.manual_seed(0)
    stage = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=1, val_names=["real", "text"])
    data = datamodule(processor, sample_data, rows=4 // ranks)
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if ranks == 2 else {}
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, max_steps=1, accumulate_grad_batches=2, logger=logger, **options).fit(stage, data)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["train/loss"]]
    metrics = {key: float(value) for key, value in row.items() if key.startswith(("train/loss_", "train/targets_"))}
    assert metrics == pytest.approx(expected(processor, sample_data, partitions=ranks), rel=1e-4)
    targets = {key: value for key, value in metrics.items() if key.startswith("train/targets_source/")}
    total = sum(metrics[key.replace("targets", "loss")] * count for key, count in targets.items())
    assert float(row["train/loss"]) == pytest.approx(total / sum(targets.values()), rel=1e-4)


def test_a_run_may_go_on_with_other_sources(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    stage = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=1, val_names=["real", "text"])
    stage._counted, stage._sums = ["task/text", "source/old"], torch.full((2, 2), 1e9, dtype=torch.float64)
    run = trainer(tmp_path, max_steps=1)
    run.fit(stage, datamodule(processor, sample_data))
    assert float(run.callback_metrics["train/targets_source/real"]) < 1000
    assert "train/targets_source/old" not in run.callback_metrics
