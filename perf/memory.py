"""How much memory a step takes, measured, beside what `plan=true` says of it.

    python -m perf.memory model=sphinx_sample trainer=cpu data.packing.micro_batch_rows=8
    python -m perf.memory model=sphinx_sample trainer=zero3_cpu trainer.devices=2 --threads 1

Overrides are those of train.py, whose stage and trainer run on random batches (no data is needed); several devices are
as many processes. Measured are bytes that PyTorch's allocator has handed out since before the model was built: on a CPU
from the profiler's memory events, which also see what lives inside one operation (of several ranks, by following every
tensor's storage), on a GPU its own maximum.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function
from torch.utils.data import DataLoader

from perf.harness import configuration, console, parser, run_command, table
from sphinx_pl.data.schema import IGNORE, Batch
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.planning.memory import LiveBytes, Shape
from sphinx_pl.planning.plan import Plan, make_plan
from sphinx_pl.stages import build
from sphinx_pl.stages.stage import OTHERS_KEYS, Stage
from sphinx_pl.utils.errors import UserError

MARK = "from here on"


@dataclass(frozen=True)
class Measured:
    """The memory and time of a run of some steps, and its plan."""

    peak: int
    """Bytes of the rank that took most."""
    seconds: list[float]
    """Time of each step on the first rank."""
    losses: list[float]
    plan: Plan

    @property
    def estimate(self) -> float:
        """The plan's, of the same rank. On CPU processes what is offloaded lies in the same memory."""
        memory, engine = self.plan.memory, self.plan.engine
        return memory.total + (0 if engine.gpu else memory.host / engine.per_node)

    @property
    def ratio(self) -> float:
        """Estimate over measurement."""
        return self.estimate / self.peak


def untrained(overrides: Sequence[str], folder: Path, steps: int) -> DictConfig:
    """The configuration of train.py with new weights."""
    cfg: DictConfig = configuration(*overrides, f"trainer.default_root_dir={folder}", f"trainer.max_steps={steps}")
    cfg.stage.init_from = None
    _start_from_nothing(cfg.model)
    return cfg


def _start_from_nothing(model: DictConfig) -> None:
    for key, value in model.items():
        if key == "load":
            model.load = None
        elif OmegaConf.is_dict(value):
            _start_from_nothing(value)


class Drawn(build.Fresh):
    """New weights, drawn where the model will live.

    On a GPU's machine drawing 13B on one CPU core, as a run does for the sake of the same start on every device, would
    take longer than what is measured here.
    """

    def __init__(self, config: SphinxConfig, device: torch.device) -> None:
        super().__init__(config)
        self.device = device

    def __call__(self, name: str) -> Tensor:
        value = torch.empty(self.model.get_parameter(name).shape, device=self.device)
        if value.dim() > 1:
            return nn.init.normal_(value, std=value[0].numel() ** -0.5)
        return value.fill_(0.0 if name.endswith("bias") else 1.0)


def random_batch(config: SphinxConfig, shape: Shape) -> Batch:
    """A random micro-batch of that shape, with rows of equal samples, one for each image, as a plan assumes."""
    rows, length = shape.rows, shape.length
    segment_ids = 1 + torch.arange(length, dtype=torch.int32) * max(1, round(shape.images)) // length
    images = max(1, round(rows * shape.images)) if config.vision else 0
    supervised = max(1, round(rows * shape.supervised))
    labels = torch.full((rows * length,), IGNORE)
    labels[torch.randperm(rows * length)[:supervised]] = 1
    zeros = torch.zeros(rows, length, dtype=torch.int32)
    size = config.vision.image_size if config.vision else 0
    return Batch(
        input_ids=torch.randint(config.decoder.vocab_size, (rows, length)),
        labels=labels.view(rows, length),
        weights=torch.ones(rows, length),
        segment_ids=segment_ids.expand(rows, -1).contiguous(),
        question_ids=zeros,
        position_ids=torch.arange(length).expand(rows, -1).contiguous(),
        task_ids=zeros.clone(),
        pixels=torch.randint(256, (images, 3, size, size), dtype=torch.uint8),
        image_slots=torch.arange(images * config.tokens_per_image),
        tasks=["text"],
        step_weight=float(supervised),
    )


class _Watch(L.Callback):
    """Times steps; says when the optimizer has its states, since what is there for a moment at the start is no peak."""

    def __init__(self, follow: LiveBytes | None) -> None:
        self.follow = follow
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._since = 0.0

    def on_train_start(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, index: int) -> None:
        if batch.ends_step:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))  # waits for the device
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds.append(now - self._since)
            self._since = now

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 1 and index == trainer.accumulate_grad_batches:
            if module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if self.follow is not None:
                self.follow.phase = MARK
            with record_function(MARK):
                pass


def stage_and_trainer(cfg: DictConfig, callbacks: Sequence[L.Callback]) -> tuple[Stage, L.Trainer]:
    """The stage and trainer that train.py makes, without loggers and validation."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.stage, resolve=True)  # type: ignore[assignment]
    kind = get_class(options.pop("_target_"))
    for key in OTHERS_KEYS:
        options.pop(key)
    without: dict[str, Any] = {"logger": False, "limit_val_batches": 0, "log_every_n_steps": 1}
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=list(callbacks), **without)
    return kind(SphinxConfig.from_dict(cfg.model), **options), trainer


def train(cfg: DictConfig, shape: Shape) -> dict[str, Any]:
    """Trains in this process. `peak` is the most bytes that were allocated in any step but the first."""
    batch = random_batch(SphinxConfig.from_dict(cfg.model), shape)
    last = dataclasses.replace(batch, ends_step=True)
    step = [*[dataclasses.replace(batch, ends_step=False)] * (int(cfg.stage.accumulate) - 1), last]
    endless = DataLoader(step * 100, batch_size=None, collate_fn=None)  # type: ignore[arg-type]
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    # Ranks: the profiler would miss what is freed by the threads of a collective call, so storages are followed.
    follow = LiveBytes(resized=True) if trainer_ranks(cfg) > 1 and not on_gpu else None
    watch = _Watch(follow)
    with profile(enabled=not on_gpu and follow is None, profile_memory=True, use_kineto=True) as profiler:
        stage, trainer = stage_and_trainer(cfg, [watch])
        drawn = functools.partial(Drawn, device=trainer.strategy.root_device)
        with follow or contextlib.nullcontext(), mock.patch.object(build, "Fresh", drawn):
            trainer.fit(stage, endless)
    if follow is not None:
        peak = int(follow.peaks[MARK].total())
    elif on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _peak(profiler.kineto_results.events())
    return {"peak": peak, "seconds": watch.seconds, "losses": watch.losses}


def trainer_ranks(cfg: DictConfig) -> int:
    return int(os.environ.get("WORLD_SIZE", cfg.trainer.devices))


def _peak(events: Any) -> int:
    """The largest sum of the allocator's events after the mark."""
    ordered = sorted((e.start_ns(), e.name(), e.nbytes()) for e in events if e.name() in ("[memory]", MARK))
    live = peak = 0
    counting = False
    for _, name, size in ordered:
        counting = counting or name == MARK
        live += size if name == "[memory]" else 0
        peak = max(peak, live if counting else 0)
    return peak


def plan_of(overrides: Sequence[str], images: float | None = None, supervised: float | None = None) -> Plan:
    """Args: images, supervised: what rows hold; None: what a plan without data assumes."""
    cfg = untrained(overrides, Path(), steps=3)
    cfg.plan_for.images_per_row, cfg.plan_for.supervised = images, supervised
    return make_plan(cfg, next((o.partition("=")[2] for o in overrides if o.startswith("trainer=")), ""))


def measure(
    overrides: Sequence[str],
    images: float | None = None,
    supervised: float | None = None,
    threads: int = 1,
    steps: int = 3,
    plan: Plan | None = None,
) -> Measured:
    """Trains on every rank.

    Args:
        plan: of these overrides, where it is there already: a large model's takes half a minute.

    Raises:
        UserError: no plan can be made, or a rank failed.
    """
    plan = plan or plan_of(overrides, images, supervised)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A process of its own, so that nothing but the run is in its memory.
        command, ranks = [sys.executable], plan.engine.ranks
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "perf.memory", *overrides, f"--rank-out={folder}", f"--steps={steps}"]
        command += [f"--images={plan.content.images}", f"--supervised={plan.content.supervised / plan.row_length}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"a rank failed: {result.stderr.strip()[-2000:]}")
        reports = [json.loads((folder / f"rank-{rank}").read_text()) for rank in range(ranks)]
        return Measured(max(rank["peak"] for rank in reports), reports[0]["seconds"], reports[0]["losses"], plan)


def print_table(options: argparse.Namespace) -> None:
    """Trains and prints what was planned and what was measured; a rank writes its part to a file instead."""
    if options.rank_out:
        cfg = untrained(options.overrides, options.rank_out, options.steps)
        length = int(cfg.data.packing.row_length)
        shape = Shape(int(cfg.data.packing.micro_batch_rows), length, options.supervised * length, options.images)
        (options.rank_out / f"rank-{os.environ.get('RANK', 0)}").write_text(json.dumps(train(cfg, shape)))
        return
    run = measure(options.overrides, options.images, options.supervised, options.threads or 1, options.steps)
    plan = run.plan
    sizes = (f"{run.estimate / 1e6:,.1f}", f"{run.peak / 1e6:,.1f}", f"{run.ratio:.3f}")
    title = f"{plan.model}, {plan.engine.kind} on {plan.engine.ranks}, {plan.engine.precision}"
    columns = ("checkpointing", "rows", "estimated MB", "measured MB", "estimate / measured")
    console().print(table(title, columns, [[plan.checkpointing, str(plan.rows), *sizes]]))


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__, "model=..., trainer=...")
    command.add_argument("--images", type=float, default=1.0, help="of a row")
    command.add_argument("--supervised", type=float, default=0.5, help="share of positions with a target")
    command.add_argument("--steps", type=int, default=3)
    command.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    return run_command(command, print_table, arguments)


if __name__ == "__main__":
    sys.exit(main())
