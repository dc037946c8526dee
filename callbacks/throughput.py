"""How fast a run is, what its steps spend their time on, and how much of the device it uses."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sphinx_pl.data.record import Batch
from sphinx_pl.flops import TrainingFlops
from sphinx_pl.gpus import flops_of_device
from sphinx_pl.stages import Stage

COUNTED = ("tokens", "targets", "images", "samples", "positions")
SPANS = ("data", "forward_backward", "optimizer", "other")


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

    `interrupt` drops the running stretch: validation and checkpoints are not part of a step.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.since: Any = None
        self.closed: list[tuple[str, Any, Any]] = []

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
        self.since = None

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(SPANS, 0.0)
        for name, start, end in self.closed:
            seconds[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self.closed.clear()
        return seconds


def torch_optimizer(trainer: L.Trainer) -> torch.optim.Optimizer:
    """PyTorch's optimizer, which DeepSpeed keeps in one of its own (and steps once for each of its buffers)."""
    optimizer: Any = trainer.optimizers[0]
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


class Throughput(L.Callback):
    """Logs `perf/*` and `data/*` with every `trainer.log_every_n_steps`-th step.

    Rates are of all ranks together, over the steps since the last log, without validation and checkpoints.
    `perf/tokens_per_s` counts every position that is not padding, `perf/targets_per_s` the supervised ones;
    `perf/padding` is the share of positions that are padding. `perf/time_*` are seconds per optimizer step on this
    rank: `data` (waiting for the next batch), `forward_backward`, `optimizer` (with clipping), `other` (callbacks), and
    their sum `step`. `perf/memory_gb` is the peak so far: allocated on the GPU, or resident of this process on a CPU.
    Of all ranks since the start of the run: `data/seen/<source>` records, the `samples`, `tokens`, `targets` and
    `images` made of them, and what was `skipped`, `filtered` or `capped` (`data/skipped/<source>/<reason>`).
    `perf/mfu` is model FLOPs (Chowdhery et al. 2022, appendix B; vision towers counted) per second over the peak.

    Args:
        peak: FLOP/s of one device, instead of the built-in table's or the measured number.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self._spans: _Spans | None = None
        self._hook: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Stage)
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        self.peak = self.peak or peak_flops(pl_module.device, dtype)
        self._flops_of = TrainingFlops(pl_module.sphinx)
        self._spans = _Spans(pl_module.device.type == "cuda")
        self._hook = torch_optimizer(trainer).register_step_post_hook(self._after_step)
        self._reset()

    def _reset(self) -> None:
        self._counts: Counter[str] = Counter()
        self._steps = 0
        self._flops = 0.0

    def _after_step(self, *_: Any) -> None:
        self._close("optimizer")

    def _close(self, name: str) -> None:
        if self._spans is not None:
            self._spans.close(name)

    def _interrupt(self) -> None:
        if self._spans is not None:
            self._spans.interrupt()

    def on_train_batch_start(self, *_: Any) -> None:
        self._close("data")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._close("forward_backward")

    def on_validation_start(self, *_: Any) -> None:
        self._interrupt()

    def on_save_checkpoint(self, *_: Any) -> None:
        self._interrupt()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._close("other" if batch.window_end else "forward_backward")
        self._counts.update({key: int(batch.counters.get(key, 0)) for key in COUNTED})
        self._flops += self._flops_of(batch)
        self._steps += batch.window_end
        if batch.window_end and trainer.global_step % trainer.log_every_n_steps == 0:
            metrics = self._metrics(trainer, pl_module.device)
            pl_module.log_dict(metrics | data_metrics(trainer.datamodule.counters()))
            self._reset()

    def on_train_end(self, *_: Any) -> None:
        self._hook.remove()
        self._spans = None

    def _metrics(self, trainer: L.Trainer, device: torch.device) -> dict[str, float]:
        assert self._spans is not None
        assert self.peak is not None
        spans = self._spans.take()
        seconds = max(sum(spans.values()), 1e-9)
        *counts, flops = _summed([*(self._counts[key] for key in COUNTED), self._flops], trainer, device)
        totals = dict(zip(COUNTED, counts, strict=True))
        metrics = {f"perf/{key}_per_s": totals[key] / seconds for key in COUNTED if key != "positions"}
        metrics["perf/padding"] = 1 - totals["tokens"] / max(totals["positions"], 1)
        metrics["perf/mfu"] = flops / seconds / (self.peak * trainer.world_size)
        metrics["perf/memory_gb"] = peak_memory(device) / 1e9
        metrics["perf/time_step"] = seconds / self._steps
        return metrics | {f"perf/time_{name}": value / self._steps for name, value in spans.items()}


def _summed(values: list[float], trainer: L.Trainer, device: torch.device) -> list[float]:
    """Over all ranks."""
    if trainer.world_size == 1:
        return values
    tensor: Tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on this GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def data_metrics(counters: dict[str, int]) -> dict[str, float]:
    """`data/<what>/<source>` and `data/skipped/<source>/<reason>` from counters named `source/what[/reason]` (while
    samples are drawn) or `skipped/source/reason` (while images are decoded)."""
    metrics: Counter[str] = Counter()
    for key, count in counters.items():
        if "/" not in key:
            continue
        source, what, *reason = key.split("/", 2)
        if source == "skipped":
            source, what = what, source
        metrics["/".join(("data", what, source, *reason))] += count
    return {key: float(count) for key, count in metrics.items()}
