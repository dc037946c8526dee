"""Measures the speed of a run, the time of each part of a step, and the use of the device."""

from __future__ import annotations

import contextlib
import functools
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from sphinx_pl.data.schema import Batch
from sphinx_pl.data.skip import split_counter
from sphinx_pl.data.train_loader import TrainLoader
from sphinx_pl.planning.flops import TrainingFlops
from sphinx_pl.planning.gpus import flops_of_device
from sphinx_pl.runtime.collectives import of_all_ranks
from sphinx_pl.stages import Stage

COUNTED = ("tokens", "targets", "images", "samples", "positions")
SPANS = ("data", "forward", "backward", "optimizer", "other")
"""The parts of an optimizer step. A checkpoint is timed separately."""
PROBE = {"cuda": (3072, 4), "cpu": (512, 4)}
"""Side and number of the matrix products that compare the speeds of ranks.

They take about a millisecond.
"""


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Return the FLOP/s of the fastest of a few square matrix products, which is what this device
    really reaches.

    It draws no random number.
    """
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one also warms up
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s that MFU refers to: a known GPU's bf16 number from its data sheet, else
    `measured_peak`.
    """
    if device.type == "cuda":
        listed = flops_of_device(torch.cuda.get_device_name(device))
        return listed or measured_peak(device, dtype, size=8192)
    return measured_peak(device, dtype)


class _Spans:
    """Named, consecutive spans of time.

    On a GPU they are read from its own clock, so that nothing waits.

    `interrupt` drops the running span, since a validation is not part of a step. `apart` inserts a
    separate span.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.since: Any = None
        self.closed: list[tuple[str, Any, Any]] = []
        self._apart = False

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def close(self, name: str) -> None:
        now = self._now()
        if self.since is not None:
            self.closed.append((name, self.since, now))
        self.since = now

    def interrupt(self) -> None:
        if not self._apart:
            self.since = None

    @contextlib.contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Time the code in this context as a span of this name."""
        running = self.since is not None
        self.close("other")
        self._apart = True
        try:
            yield
        finally:
            self._apart = False
            self.close(name)
            self.since = self.since if running else None

    def take(self) -> dict[str, float]:
        """Return the seconds by name since the last call."""
        if self.cuda and self.closed:
            self.closed[-1][2].synchronize()
        seconds = dict.fromkeys((*SPANS, "checkpoint"), 0.0)
        for name, start, end in self.closed:
            seconds[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self.closed.clear()
        return seconds


@dataclass(frozen=True)
class RankPart:
    """The work of one rank since the last log."""

    seconds: dict[str, float]  # keys: SPANS and "checkpoint"
    counts: dict[str, int]  # keys: COUNTED
    flops: float
    memory: int  # bytes, the peak so far
    speed: float = 1.0  # FLOP/s of a task that every rank does alone


class Throughput(L.Callback):
    """Logs `perf/*` and `data/*` with every `trainer.log_every_n_steps`-th step. docs/watching.md
    explains them.

    Rates are totals of all ranks over the steps since the last log, without validation and
    checkpoints. `perf/tokens_per_s` counts all positions other than padding, and
    `perf/targets_per_s` the supervised ones. `perf/padding` is the share of padding. `perf/time_*`
    are seconds per optimizer step, the mean over ranks. Their parts are `data` (from asking for a
    micro-batch until it is on the device), `forward`, `backward`, `optimizer` (with clipping) and
    `other` (callbacks, loggers). Their sum is `step`. `checkpoint` is separate, in the first row
    after it was written.

    On a GPU these are times between events on its own clock. `data` is the time in which the GPU
    was idle, not the time in which the host waited. The host waits for the GPU only at a log.

    The times include waiting for other ranks. Gradients are summed in `backward`, the weight of
    every micro-batch in `forward`. With ZeRO-3 or FSDP the parameters of each layer are gathered in
    both. So all ranks show the times of the slowest rank, and the times do not tell which one it
    is. Other numbers tell what makes a rank slow, under every strategy. `data` contains no
    collective (`perf/time_data_max`, unless every source has `epochs`). `perf/work_max` compares
    the FLOPs of a rank's micro-batches with the mean. `perf/speed_min` compares the speed of a
    matrix product that every rank does alone at a log with the mean. It reveals a hot GPU or a
    busy CPU. Each comes with its `_rank`.

    `perf/memory_gb` is the largest peak of all ranks so far: allocated on the GPU, or resident in a
    process on a CPU. These count all ranks since the start of the run: `data/seen/<source>`
    records, the `samples`, `tokens`, `targets` and `images` made from them, and the `skipped`,
    `filtered` or `capped` ones (`data/skipped/<source>/<reason>`). `perf/mfu` is model FLOPs
    (Chowdhery et al. 2022, appendix B) per second over the peak. It counts visual encoders
    without skipped views, and attention within samples without what the mask hides
    (`TrainingFlops`).

    Put it first among the callbacks: those before it count as `optimizer`.

    Args:
        peak: FLOP/s of one device, instead of the built-in table's or the measured number.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self._spans: _Spans | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Stage)
        self._dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        self.peak = self.peak or peak_flops(pl_module.device, self._dtype)
        self._flops_of = TrainingFlops(pl_module.sphinx)
        self._spans = _Spans(pl_module.device.type == "cuda")
        if isinstance(trainer.train_dataloader, TrainLoader):
            trainer.train_dataloader.asked = lambda: self._close("other")
        self._reset()

    def _reset(self) -> None:
        self._counts: Counter[str] = Counter()
        self._steps = 0
        self._flops = 0.0

    def _close(self, name: str) -> None:
        if self._spans is not None:
            self._spans.close(name)

    def _interrupt(self) -> None:
        if self._spans is not None:
            self._spans.interrupt()

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Count the code in this context as `perf/time_checkpoint` and not as part of a step."""
        with self._spans.apart("checkpoint") if self._spans is not None else contextlib.nullcontext():
            yield

    # Lightning's precision plugins, including DeepSpeed's, call both under every strategy.
    def on_before_backward(self, *_: Any) -> None:
        self._close("forward")

    def on_after_backward(self, *_: Any) -> None:
        self._close("backward")

    def on_train_batch_start(self, *_: Any) -> None:
        self._close("data")

    def on_validation_start(self, *_: Any) -> None:
        self._interrupt()

    def on_save_checkpoint(self, *_: Any) -> None:
        self._interrupt()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Stage)
        # on_before_optimizer_step does not tell the end of a step, since DeepSpeed's plugin calls
        # it after every micro-batch. DeepSpeed's optimizer has no hooks either.
        self._close("optimizer" if batch.ends_step else "other")
        self._counts.update({key: int(batch.counters.get(key, 0)) for key in COUNTED})
        self._flops += self._flops_of(batch)
        self._steps += batch.ends_step
        if batch.ends_step and trainer.global_step % trainer.log_every_n_steps == 0:
            metrics = self._metrics(trainer, pl_module.device)
            pl_module.log_now(metrics | data_metrics(trainer.datamodule.counters()), trainer.global_step)
            self._reset()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.train_dataloader, TrainLoader):
            trainer.train_dataloader.asked = lambda: None
        self._spans = None

    def _metrics(self, trainer: L.Trainer, device: torch.device) -> dict[str, float]:
        assert self._spans is not None
        assert self.peak is not None
        # A single rank needs no comparison.
        speed = measured_peak(device, self._dtype, *PROBE[device.type]) if trainer.world_size > 1 else 1.0
        own = RankPart(self._spans.take(), dict(self._counts), self._flops, peak_memory(device), speed)
        return metrics_of(of_all_ranks(own, trainer.world_size), self._steps, self.peak)


def metrics_of(ranks: Sequence[RankPart], steps: int, peak: float) -> dict[str, float]:
    """Return `perf/*` from the work of all ranks in the same `steps` optimizer steps.

    `peak` is the FLOP/s of one device.
    """
    spans = {name: sum(rank.seconds[name] for rank in ranks) / len(ranks) for name in (*SPANS, "checkpoint")}
    seconds = max(sum(spans[name] for name in SPANS), 1e-9)
    totals = {key: sum(rank.counts.get(key, 0) for rank in ranks) for key in COUNTED}
    metrics = {f"perf/{key}_per_s": totals[key] / seconds for key in COUNTED if key != "positions"}
    metrics["perf/padding"] = 1 - totals["tokens"] / max(totals["positions"], 1)
    metrics["perf/mfu"] = sum(rank.flops for rank in ranks) / seconds / (peak * len(ranks))
    metrics["perf/memory_gb"] = max(rank.memory for rank in ranks) / 1e9
    metrics["perf/time_step"] = seconds / steps
    metrics |= {f"perf/time_{name}": value / steps for name, value in spans.items()}
    if len(ranks) == 1:
        return metrics
    memory = [rank.memory for rank in ranks]
    data = [rank.seconds["data"] / steps for rank in ranks]
    work = [rank.flops for rank in ranks]
    speed = [rank.speed for rank in ranks]
    metrics["perf/time_data_max"] = max(data)
    metrics["perf/work_max"] = max(work) * len(work) / max(sum(work), 1e-9)
    metrics["perf/speed_min"] = min(speed) * len(speed) / sum(speed)
    of_rank = {"memory_gb": memory.index(max(memory)), "time_data_max": data.index(max(data))}
    of_rank |= {"work_max": work.index(max(work)), "speed_min": speed.index(min(speed))}
    return metrics | {f"perf/{name}_rank": float(rank) for name, rank in of_rank.items()}


def timed_checkpoint(write: Callable[..., None]) -> Callable[..., None]:
    """Decorate a function that writes a checkpoint: a `Throughput` callback then times it apart
    from the steps.
    """

    @functools.wraps(write)
    def timed(trainer: L.Trainer, *args: Any, **options: Any) -> None:
        watches = [callback for callback in trainer.callbacks if isinstance(callback, Throughput)]
        with watches[0].checkpoint() if watches else contextlib.nullcontext():
            write(trainer, *args, **options)

    return timed


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes that were allocated on this GPU, or resident in this process on a
    CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def data_metrics(counters: dict[str, int]) -> dict[str, float]:
    """Return `data/<what>/<source>`, or `data/skipped/<source>/<reason>`, for each counter.

    Counters are named `source/what[/reason]` or `skipped/source/reason`.
    """
    metrics: Counter[str] = Counter()
    for key, count in counters.items():
        if "/" not in key:
            continue
        source, kind = split_counter(key)
        what, *reason = kind.split("/", 1)
        metrics["/".join(("data", what, source, *reason))] += count
    return {key: float(count) for key, count in metrics.items()}
