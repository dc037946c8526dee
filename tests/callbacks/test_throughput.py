from __future__ import annotations

import csv
import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode

from sphinx_pl.callbacks import throughput
from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint
from sphinx_pl.callbacks.throughput import COUNTED, SPANS, RankPart, Throughput, data_metrics, measured_peak, metrics_of
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.schema import Batch, Sample, SampleQuestion
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx, packed_mask
from sphinx_pl.planning.flops import TrainingFlops
from sphinx_pl.stages import Stage

Fit = Callable[..., Any]


class Batches(L.Callback):
    """Keeps the batches that were trained on."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        self.batches.append(batch)


class Clock:
    """A clock that advances only by sleeping. So times are exact, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def logged(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.csv with throughput."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items() if value} for row in rows if row["perf/time_step"]]


def test_rates_are_those_of_the_batches_trained_on(fit: Fit, tmp_path: Path) -> None:
    batches = Batches()
    _, stage = fit([batches, Throughput(peak=1e12)], [CSVLogger(tmp_path, name="", version="")])
    rows = logged(tmp_path)
    assert len(rows) == 2  # four steps, logged every second
    # two micro-batches a step
    for row, step in zip(rows, (batches.batches[:4], batches.batches[4:]), strict=True):
        seconds = 2 * row["perf/time_step"]
        padding = [(batch.segment_ids == 0).float().mean().item() for batch in step]
        expected = {
            "perf/tokens_per_s": sum(int((batch.segment_ids > 0).sum()) for batch in step) / seconds,
            "perf/targets_per_s": sum(int((batch.labels >= 0).sum()) for batch in step) / seconds,
            "perf/images_per_s": sum(len(batch.pixels) for batch in step) / seconds,
            "perf/samples_per_s": sum(len(batch.keys) for batch in step) / seconds,
            "perf/padding": sum(padding) / len(padding),
            "perf/mfu": sum(map(TrainingFlops(stage.sphinx), step)) / seconds / 1e12,
        }
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        parts = [row[f"perf/time_{name}"] for name in SPANS]
        assert sum(parts) == pytest.approx(row["perf/time_step"], rel=1e-4)
        assert min(parts) > 0
        assert row["perf/time_checkpoint"] == 0
        assert not any(name.endswith("_rank") for name in row)  # one process
        assert 0.1 < row["perf/memory_gb"] < 16


def test_training_flops_are_those_that_torch_counts(datamodule: DataModule, model_config: SphinxConfig) -> None:
    batch = datamodule.collator(datamodule.planner().plan()[0].rows)
    assert len(batch.pixels) > 1
    counted, computed = [], []
    # ConvNeXt is off, since torch counts the backward pass of its depthwise convolutions as if they
    # were dense.
    for frozen in ([], ["clip", "dinov2", "qformer"]):
        model = Sphinx(model_config)
        model.freeze(frozen)
        with FlopCounterMode(display=False) as counter:
            model.token_losses(batch).nll.sum().backward()
        counted.append(counter.get_total_flops())
        rows, length = batch.input_ids.shape
        # Torch counts all pairs of a row's positions, whatever the mask hides.
        flops = TrainingFlops(model).of(rows * length, rows * length**2, batch.counters["targets"], len(batch.pixels))
        computed.append(flops)
    assert computed == pytest.approx(counted, rel=0.05)
    # The patch embeddings compute no gradient of the pixels, which matters in encoders as small as
    # these.
    assert computed[0] - computed[1] == pytest.approx(counted[0] - counted[1], rel=0.15)


def test_attention_counts_the_pairs_that_its_mask_lets_through(model_config: SphinxConfig) -> None:
    """Counted by hand: 3 + 2 + 4 positions of a prefix and two questions, and 5 of a sample of one."""

    def question(count: int) -> SampleQuestion:
        return SampleQuestion([5] * count, [False] + [True] * (count - 1), "chat", "key")

    shared = Sample([1, 5, 5], [question(2), question(4)], (), "a")
    alone = Sample([1], [question(4)], (), "a")
    assert shared.pairs == (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7)
    assert alone.pairs == 1 + 2 + 3 + 4 + 5
    batch = Collator(row_length=20, image_size=64)([[shared, alone], [alone]])
    mask = packed_mask(batch.segment_ids, batch.question_ids)
    padding = int((batch.segment_ids == 0).sum())  # sees itself
    assert batch.counters["pairs"] == int(mask.sum()) - padding == 37 + 2 * 15
    model = Sphinx(dataclasses.replace(model_config, vision=None))
    c = model_config.decoder
    whole = TrainingFlops(model).of(40, 2 * 20**2, batch.counters["targets"], 0)
    hidden = 3 * c.layers * 4 * c.width * (2 * 20**2 - 67)
    assert TrainingFlops(model)(batch) == pytest.approx(whole - hidden, rel=1e-12)


def test_empty_rows_cost_what_they_compute(model_config: SphinxConfig) -> None:
    """They fill the last step of finite data."""
    empty = Collator(row_length=20, image_size=64)([[], []])
    flops = TrainingFlops(Sphinx(model_config))
    assert flops(empty) == flops.of(2 * 20, 0, 0, 0) > 0


def test_waiting_for_data_is_told_from_computing(
    fit: Fit, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate = Collator.__call__

    def slow(self: Collator, rows: Any) -> Batch:
        clock.sleep(0.5)
        return collate(self, rows)

    monkeypatch.setattr(Collator, "__call__", slow)
    fit([Throughput(peak=1e12)], [CSVLogger(tmp_path, name="", version="")], val_check_interval=1000)
    row = logged(tmp_path)[-1]
    # two micro-batches a step
    assert row["perf/time_data"] == row["perf/time_step"] == pytest.approx(2 * 0.5)


def test_forward_and_backward_are_told_apart(
    fit: Fit, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, optimize = Stage.training_step, torch.optim.AdamW.step

    def slow_step(self: Stage, batch: Batch, index: int) -> torch.Tensor:
        clock.sleep(0.2)
        loss = step(self, batch, index)
        loss.register_hook(lambda _: clock.sleep(0.4))
        return loss

    def slow_optimizer(self: Any, *args: Any, **options: Any) -> Any:
        result = optimize(self, *args, **options)
        clock.sleep(0.6)
        return result

    monkeypatch.setattr(Stage, "training_step", slow_step)
    monkeypatch.setattr(torch.optim.AdamW, "step", slow_optimizer)
    fit([Throughput(peak=1e12)], [CSVLogger(tmp_path, name="", version="")], steps=2, val_check_interval=1000)
    (row,) = logged(tmp_path)
    # two micro-batches a step
    for name, seconds in (("forward", 2 * 0.2), ("backward", 2 * 0.4), ("optimizer", 0.6)):
        assert row[f"perf/time_{name}"] == pytest.approx(seconds), name


def test_callbacks_and_loggers_are_not_taken_for_waiting_for_data(fit: Fit, tmp_path: Path, clock: Clock) -> None:
    class Slow(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.sleep(0.2)

    fit([Throughput(peak=1e12), Slow()], [CSVLogger(tmp_path, name="", version="")], val_check_interval=1000)
    row = logged(tmp_path)[-1]
    # There are two steps of two micro-batches. The work follows the row, so the last part is in the
    # next row.
    assert row["perf/time_other"] == pytest.approx(2 * 0.2)
    assert row["perf/time_data"] == 0


def test_validation_and_checkpoints_are_no_part_of_a_step(fit: Fit, tmp_path: Path, clock: Clock) -> None:
    class Slow(L.Callback):
        def on_validation_start(self, *_: Any) -> None:
            clock.sleep(0.5)

        def on_save_checkpoint(self, *_: Any) -> None:
            clock.sleep(0.5)

    class Foreign(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if args[2].ends_step:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    logger = [CSVLogger(tmp_path, name="", version="")]
    fit([Throughput(peak=1e12), Slow(), Foreign()], logger, val_check_interval=2)
    assert [row["perf/time_step"] for row in logged(tmp_path)] == pytest.approx([0, 0], abs=1e-6)


# saved at a batch's end, or after a validation
@pytest.mark.parametrize("validation", [1000, 2 * 2])
def test_checkpoints_have_a_time_of_their_own(validation: int, fit: Fit, tmp_path: Path, clock: Clock) -> None:
    class Slow(L.Callback):
        def on_save_checkpoint(self, *_: Any) -> None:
            clock.sleep(1)

    checkpoint = ResumeCheckpoint(str(tmp_path / "checkpoints"), every_n_steps=2)
    logger = [CSVLogger(tmp_path, name="", version="")]
    fit([Throughput(peak=1e12), Slow(), checkpoint], logger, val_check_interval=validation)
    first, second = logged(tmp_path)
    assert first["perf/time_checkpoint"] == 0
    assert second["perf/time_checkpoint"] == pytest.approx(0.5)  # one in two steps
    assert second["perf/time_step"] == pytest.approx(0, abs=1e-6)


def test_skipped_samples_are_logged_by_source_and_reason(
    fit: Fit, datamodule: DataModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n{"text": ""}\n')
    datamodule.sources["text"]["path"] = str(text)
    datamodule.max_skipped = 1.0
    caplog.set_level("INFO")
    trainer, _ = fit([Throughput(peak=1e12)], [CSVLogger(tmp_path, name="", version="")])
    assert float(trainer.callback_metrics["data/skipped/text/text_empty"]) > 0
    assert re.search(r"data: text, of \d+ records: skipped/text_empty: \d+, such as .+", caplog.text)


def test_events_are_metrics_as_what_is_skipped() -> None:
    counters = {"a/seen": 9, "a/cut": 2, "skipped/a/key_unknown": 1, "skipped/a/image_missing": 3, "samples": 12}
    metrics = {"data/seen/a": 9, "data/cut/a": 2, "data/skipped/a/key_unknown": 1, "data/skipped/a/image_missing": 3}
    assert data_metrics(counters) == metrics


def part(data: float, memory: int, flops: float, speed: float) -> RankPart:
    seconds = dict.fromkeys(SPANS, 1.0) | {"data": data, "checkpoint": 3.0}
    return RankPart(seconds, dict.fromkeys(COUNTED, 100) | {"tokens": 60}, flops, memory, speed)


def test_what_makes_a_rank_slow_is_named_with_its_rank() -> None:
    ranks = [part(2.0, 10**9, 4e12, 9e9), part(6.0, 2 * 10**9, 2e12, 9e9), part(1.0, 10**9, 3e12, 6e9)]
    metrics = metrics_of(ranks, steps=2, peak=1e12)
    expected = {
        "perf/time_data": 1.5,
        "perf/time_forward": 0.5,
        "perf/time_checkpoint": 1.5,
        "perf/time_step": 3.5,  # without the checkpoint
        "perf/tokens_per_s": 180 / 7,
        "perf/padding": 0.4,
        "perf/mfu": 9e12 / 7 / 3e12,
        "perf/memory_gb": 2.0,
        "perf/memory_gb_rank": 1,
        "perf/time_data_max": 3.0,
        "perf/time_data_max_rank": 1,
        "perf/work_max": 4 / 3,
        "perf/work_max_rank": 0,
        "perf/speed_min": 0.75,
        "perf/speed_min_rank": 2,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)


@pytest.mark.timeout(120)
def test_two_ranks_find_the_one_that_waits_for_its_data(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate = Collator.__call__

    def slow(self: Collator, rows: Any) -> Batch:
        if torch.distributed.get_rank() == 1:
            time.sleep(0.3)
        return collate(self, rows)

    monkeypatch.setattr(Collator, "__call__", slow)
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False, "val_check_interval": 1000}
    fit([Throughput(peak=1e12)], [CSVLogger(tmp_path, name="", version="")], limit_val_batches=0, **options)
    row = logged(tmp_path)[-1]
    assert row["perf/time_data_max_rank"] == 1
    assert row["perf/time_data_max"] > 2 * 0.3
    # the other one waits in a collective
    assert row["perf/time_data"] < row["perf/time_data_max"] - 0.2
    assert row["perf/work_max"] >= 1 >= row["perf/speed_min"]


def test_skipped_views_cost_nothing(model_config: SphinxConfig) -> None:
    vision = dataclasses.replace(model_config.vision, image_size=96, grid=3, skip_padding=True)
    model = Sphinx(dataclasses.replace(model_config, vision=vision, decoder=model_config.decoder))
    rng = torch.Generator().manual_seed(0)
    counted, computed = [], []
    for count in (1, 4, 10):
        seen_NV = torch.arange(10)[None] < count
        pixels = torch.randint(0, 255, (1, 3, 96, 96), dtype=torch.uint8, generator=rng)
        with FlopCounterMode(display=False) as counter:
            model.embed_images(pixels, seen_NV)
        counted.append(counter.get_total_flops())
        computed.append(TrainingFlops(model).vision(1, count) / 3)
    assert computed == pytest.approx(counted, rel=0.03)
    assert computed[1] == pytest.approx(4 * computed[0])


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
