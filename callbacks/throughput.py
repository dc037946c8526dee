"""How fast a run is, what its steps spend their time on, and how much of the device it uses."""

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

from sphinx_pl.data.datamodule import TrainLoader
from sphinx_pl.data.schema import Batch
from sphinx_pl.data.skip import split_counter
from sphinx_pl.planning.flops import TrainingFlops
from sphinx_pl.planning.gpus import flops_of_device
from sphinx_pl.runtime.collectives import of_all_ranks
from sphinx_pl.stages import Stage

COUNTED = ("tokens", "targets", "images", "samples", "positions")
SPANS = ("data", "forward", "backward", "optimizer", "other")
"""What an optimizer step consists of. A checkpoint is timed beside it."""
PROBE = {"cuda": (3072, 4), "cpu": (512, 4)}
"""Side and number of the matrix products that tell ranks' speeds apart: about a millisecond."""


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few square matrix products: what this device can really do. Draws no random number."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one also warms up
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is measured against: the data sheet's bf16 number of a known GPU, else `measured_peak`."""
    if device.type == "cuda":
        known = flops_of_device(torch.cuda.get_device_name(device))
        return known or measured_peak(device, dtype, size=8192)
    return measured_peak(device, dtype)


class _Spans:
    """Named stretches of time, end to end. On a GPU they are read from its own clock, so that nothing is stopped.

    `interrupt` drops the running stretch: validation is not part of a step. `apart` puts one in between.
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
        """What runs inside is a stretch of this name."""
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
        """Seconds by name since the last call."""
        if self.cuda and self.closed:
            self.closed[-1][2].synchronize()
        seconds = dict.fromkeys((*SPANS, "checkpoint"), 0.0)
        for name, start, end in self.closed:
            seconds[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self.closed.clear()
        return seconds


@dataclass(frozen=True)
class RankPart:
    """What one rank did since the last log."""

    seconds: dict[str, float]  # of SPANS and "checkpoint"
    counts: dict[str, int]  # of COUNTED
    flops: float
    memory: int  # bytes, the peak so far
    speed: float = 1.0  # FLOP/s of a piece of work that every rank does alone


class Throughput(L.Callback):
    """Logs `perf/*` and `data/*` with every `trainer.log_every_n_steps`-th step. docs/watching.md says what they mean.

    Rates are of all ranks together, over the steps since the last log, without validation and checkpoints.
    `perf/tokens_per_s` counts every position that is not padding, `perf/targets_per_s` the supervised ones;
    `perf/padding` is the share of positions that are padding. `perf/time_*` are seconds per optimizer step, the mean of
    the ranks: `data` (from asking for a micro-batch until it is on the device), `forward`, `backward`, `optimizer`
    (with clipping), `other` (callbacks, loggers), and their sum `step`; `checkpoint` is beside it, in the first row
    after it was written.

    On a GPU these are times between events on its own clock: `data` is how long it had nothing to do, not how long the
    host waited, and the one wait for it is at a log. They contain the waiting for other ranks: gradients are summed in
    `backward`, every micro-batch's weight in `forward`, and with ZeRO-3 or FSDP each layer's parameters are gathered in
    both. Ranks that work in step therefore all show the times of the slowest, and which one that is cannot be read from
    them. What can be told, under every strategy, is what makes a rank slow: `data` has no collective in it
    (`perf/time_data_max`, unless every source has `epochs`); the FLOPs of the micro-batches that it got
    (`perf/work_max`, over the mean); and the speed of a matrix product that every rank does alone at a log
    (`perf/speed_min`, over the mean: a GPU that is hot, a CPU that others use). Each comes with its `_rank`.

    `perf/memory_gb` is the highest of the ranks' peaks so far: allocated on the GPU, or resident of a process on a CPU.
    Of all ranks since the start of the run: `data/seen/<source>` records, the `samples`, `tokens`, `targets` and
    `images` made of them, and what was `skipped`, `filtered` or `capped` (`data/skipped/<source>/<reason>`).
    `perf/mfu` is model FLOPs (Chowdhery et al. 2022, appendix B) per second over the peak. They include vision towers,
    without views that are skipped, and attention within samples, without what its mask hides (`TrainingFlops`).

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
        """What runs inside counts as `perf/time_checkpoint` and not as part of a step."""
        with self._spans.apart("checkpoint") if self._spans is not None else contextlib.nullcontext():
            yield

    # Both are called under every strategy: by Lightning's precision plugins, DeepSpeed's among them.
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
        # Not told by on_before_optimizer_step, which DeepSpeed's plugin calls after every micro-batch, nor by a hook of
        # the optimizer, which DeepSpeed's has not.
        self._close("optimizer" if batch.window_end else "other")
        self._counts.update({key: int(batch.counters.get(key, 0)) for key in COUNTED})
        self._flops += self._flops_of(batch)
        self._steps += batch.window_end
        if batch.window_end and trainer.global_step % trainer.log_every_n_steps == 0:
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
        # Alone among several ranks: one is as fast as itself.
        speed = measured_peak(device, self._dtype, *PROBE[device.type]) if trainer.world_size > 1 else 1.0
        own = RankPart(self._spans.take(), dict(self._counts), self._flops, peak_memory(device), speed)
        return metrics_of(of_all_ranks(own, trainer.world_size), self._steps, self.peak)


def metrics_of(ranks: Sequence[RankPart], steps: int, peak: float) -> dict[str, float]:
    """`perf/*` from what all ranks did in the same `steps` optimizer steps; `peak` FLOP/s of one device."""
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
    """For what writes a checkpoint: its time is told apart from that of steps, where a `Throughput` watches."""

    @functools.wraps(write)
    def timed(trainer: L.Trainer, *args: Any, **options: Any) -> None:
        watches = [callback for callback in trainer.callbacks if isinstance(callback, Throughput)]
        with watches[0].checkpoint() if watches else contextlib.nullcontext():
            write(trainer, *args, **options)

    return timed


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on this GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def data_metrics(counters: dict[str, int]) -> dict[str, float]:
    """`data/<what>/<source>` (an event's too) and `data/skipped/<source>/<reason>` from counters named
    `source/what[/reason]` and `skipped/source/reason`."""
    metrics: Counter[str] = Counter()
    for key, count in counters.items():
        if "/" not in key:
            continue
        source, kind = split_counter(key)
        what, *reason = kind.split("/", 1)
        metrics["/".join(("data", what, source, *reason))] += count
    return {key: float(count) for key, count in metrics.items()}
