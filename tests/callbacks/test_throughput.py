from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode

from callbacks import throughput
from callbacks.throughput import Throughput, data_metrics, measured_peak
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.packing import Collator
from sphinx_pl.data.record import Batch
from sphinx_pl.flops import TrainingFlops
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx

Fit = Callable[..., Any]


class Batches(L.Callback):
    """Keeps what was trained on."""

    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        self.seen.append(batch)


def logged(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv that have throughput in them."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items() if value} for row in rows if row["perf/time_step"]]


def test_rates_are_those_of_the_batches_trained_on(fit: Fit, tmp_path: Path) -> None:
    batches = Batches()
    _, stage = fit([batches, Throughput(peak=1e12)], [CSVLogger(tmp_path, name="", version="")])
    rows = logged(tmp_path)
    assert len(rows) == 2  # four steps, logged every second
    for row, window in zip(rows, (batches.seen[:4], batches.seen[4:]), strict=True):  # two micro-batches a step
        seconds = 2 * row["perf/time_step"]
        padding = [(batch.segment_ids == 0).float().mean().item() for batch in window]
        expected = {
            "perf/tokens_per_s": sum(int((batch.segment_ids > 0).sum()) for batch in window) / seconds,
            "perf/targets_per_s": sum(int((batch.labels >= 0).sum()) for batch in window) / seconds,
            "perf/images_per_s": sum(len(batch.pixels) for batch in window) / seconds,
            "perf/samples_per_s": sum(len(batch.keys) for batch in window) / seconds,
            "perf/padding": sum(padding) / len(padding),
            "perf/mfu": sum(3 * stage.sphinx.flops(batch) for batch in window) / seconds / 1e12,
        }
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        parts = [row[f"perf/time_{name}"] for name in ("data", "forward_backward", "optimizer", "other")]
        assert sum(parts) == pytest.approx(row["perf/time_step"], rel=1e-4)
        assert min(parts) > 0
        assert 0.1 < row["perf/memory_gb"] < 16


def test_training_flops_are_those_that_torch_counts(datamodule: DataModule, model_config: SphinxConfig) -> None:
    batch = datamodule.collator(datamodule.planner().plan()[0].rows)
    assert len(batch.pixels) > 1
    counted, computed = [], []
    # Without ConvNeXt, since torch counts the backward pass of its depthwise convolutions as if they were dense.
    for frozen in ([], ["clip", "dinov2", "qformer"]):
        model = Sphinx(model_config)
        model.freeze(frozen)
        with FlopCounterMode(display=False) as counter:
            model.token_losses(batch).nll.sum().backward()
        counted.append(counter.get_total_flops())
        computed.append(TrainingFlops(model)(batch))
    assert computed == pytest.approx(counted, rel=0.05)
    # The patch embeddings compute no gradient of the pixels, which is a share of towers as small as these.
    assert computed[0] - computed[1] == pytest.approx(counted[0] - counted[1], rel=0.15)
    assert computed[0] == pytest.approx(3 * model.flops(batch), rel=1e-9)


def test_waiting_for_data_is_told_from_computing(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collate = Collator.__call__

    def slow(self: Collator, rows: Any) -> Batch:
        time.sleep(0.2)
        return collate(self, rows)

    monkeypatch.setattr(Collator, "__call__", slow)
    fit([Throughput(peak=1e12)], [CSVLogger(tmp_path, name="", version="")], val_check_interval=1000)
    row = logged(tmp_path)[-1]
    assert 0.2 < row["perf/time_data"] < row["perf/time_step"]
    assert row["perf/time_step"] - row["perf/time_data"] < 0.2


def test_validation_and_checkpoints_are_no_part_of_a_step(fit: Fit, tmp_path: Path) -> None:
    class Slow(L.Callback):
        def on_validation_start(self, *_: Any) -> None:
            time.sleep(0.5)

        def on_save_checkpoint(self, *_: Any) -> None:
            time.sleep(0.5)

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if args[2].window_end:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    fit([Throughput(peak=1e12), Slow()], [CSVLogger(tmp_path, name="", version="")], val_check_interval=2)
    assert max(row["perf/time_step"] for row in logged(tmp_path)) < 0.5


def test_skipped_samples_are_logged_by_source_and_reason(fit: Fit, datamodule: DataModule, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n{"text": ""}\n')
    datamodule.sources["text"]["path"] = str(text)
    datamodule.max_skipped = 1.0
    trainer, _ = fit([Throughput(peak=1e12)], [CSVLogger(tmp_path, name="", version="")])
    assert float(trainer.logged_metrics["data/skipped/text/text_empty"]) > 0


def test_counters_of_planner_and_collator_are_added() -> None:
    counters = {"web/skipped/too_long": 2, "skipped/web/too_long": 1, "skipped/web/image_unreadable": 3}
    assert data_metrics(counters) == {"data/skipped/web/too_long": 3.0, "data/skipped/web/image_unreadable": 3.0}


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A1000", 1.0),
        ("NVIDIA RTX A4000", 1.0),
    ],
)
def test_peak_of_a_gpu_goes_by_its_whole_name(name: str, flops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(throughput, "measured_peak", lambda *args, **options: 1.0)
    assert throughput.peak_flops(torch.device("cuda"), torch.bfloat16) == flops


def test_measured_peak_is_reached_by_a_matrix_product_but_not_passed() -> None:
    peak = measured_peak(torch.device("cpu"), torch.float32)
    a = torch.rand(512, 512)
    start = time.perf_counter()
    a @ a
    reached = 2 * 512**3 / (time.perf_counter() - start)
    assert 0.01 * peak < reached < 3 * peak
