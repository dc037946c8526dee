"""How much memory a step takes, measured, beside what `plan=true` says of it.

    python -m benchmarks.memory model=sphinx_sample trainer=cpu data.packing.rows=8
    python -m benchmarks.memory model=sphinx_sample trainer=zero3_cpu trainer.devices=2 --threads 1

Overrides are those of train.py, whose stage and trainer run on random batches (no data is needed); several devices are
as many processes. Measured are bytes that PyTorch's allocator has handed out since before the model was built: on a CPU
from the profiler's memory events, which also see what lives inside one operation (of several ranks, by following every
tensor's storage), on a GPU its own maximum.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler import profile, record_function
from torch.utils.data import DataLoader

from sphinx_pl.cli import CONFIG_FOLDER, register_resolvers, report
from sphinx_pl.data.record import IGNORE, Batch
from sphinx_pl.errors import UserError
from sphinx_pl.memory import LiveBytes, Shape
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.plan import Plan, make_plan
from sphinx_pl.stages.stage import OTHERS_KEYS, Stage

MARK = "from here on"


@dataclass(frozen=True)
class Measured:
    """Bytes, and what the plan says they are."""

    peak: int
    plan: Plan

    @property
    def ratio(self) -> float:
        """Estimate over measurement."""
        return self.plan.memory.total / self.peak


def configuration(overrides: Sequence[str], folder: Path, steps: int) -> DictConfig:
    """train.py's, with new weights."""
    register_resolvers()
    fixed = [f"trainer.default_root_dir={folder}", f"trainer.max_steps={steps}"]
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg: DictConfig = compose("train", [*overrides, *fixed])
    OmegaConf.set_struct(cfg, False)  # not every model names weights to start from
    cfg.model.decoder.load = None
    for tower in ("clip", "convnext", "dinov2", "qformer"):
        if cfg.model.get("vision") and cfg.model.vision.get(tower):
            cfg.model.vision[tower].load = None
    cfg.stage.init_from = None
    return cfg


def random_batch(config: SphinxConfig, shape: Shape) -> Batch:
    """A micro-batch of that shape: rows that are one segment each."""
    rows, length = shape.rows, shape.length
    images = max(1, round(rows * shape.images)) if config.vision else 0
    supervised = max(1, round(rows * shape.supervised))
    labels = torch.full((rows * length,), IGNORE)
    labels[torch.randperm(rows * length)[:supervised]] = 1
    ones = torch.ones(rows, length, dtype=torch.int32)
    size = config.vision.image_size if config.vision else 0
    return Batch(
        input_ids=torch.randint(config.decoder.vocab_size, (rows, length)),
        labels=labels.view(rows, length),
        weights=torch.ones(rows, length),
        segment_ids=ones,
        branch_ids=torch.zeros_like(ones),
        position_ids=torch.arange(length).expand(rows, -1).contiguous(),
        task_ids=torch.zeros_like(ones),
        pixels=torch.randint(256, (images, 3, size, size), dtype=torch.uint8),
        image_slots=torch.arange(images * config.tokens_per_image),
        tasks=["text"],
        window_weight=float(supervised),
    )


class _Mark(L.Callback):
    """Says when the optimizer has its states: what was there for a moment at the start does not count."""

    def __init__(self, follow: LiveBytes | None) -> None:
        self.follow = follow

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 1 and index == trainer.accumulate_grad_batches:
            if module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if self.follow is not None:
                self.follow.phase = MARK
            with record_function(MARK):
                pass


def stage_and_trainer(cfg: DictConfig, callbacks: Sequence[L.Callback]) -> tuple[Stage, L.Trainer]:
    """Of the configuration, as train.py makes them, but nothing is logged and nothing held out."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.stage, resolve=True)  # type: ignore[assignment]
    kind = get_class(options.pop("_target_"))
    for key in OTHERS_KEYS:
        options.pop(key)
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=list(callbacks), logger=False, limit_val_batches=0)
    return kind(SphinxConfig.from_dict(cfg.model), **options), trainer


def peak_of(cfg: DictConfig, shape: Shape) -> int:
    """Trains a few steps in this process and returns the most bytes that were allocated in any but the first."""
    batch = random_batch(SphinxConfig.from_dict(cfg.model), shape)
    endless = DataLoader([batch] * 1000, batch_size=None, collate_fn=None)  # type: ignore[arg-type]
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    # Ranks: the profiler would miss what is freed by the threads of a collective call, so storages are followed.
    follow = LiveBytes() if trainer_ranks(cfg) > 1 and not on_gpu else None
    with profile(enabled=not on_gpu and follow is None, profile_memory=True, use_kineto=True) as profiler:
        stage, trainer = stage_and_trainer(cfg, [_Mark(follow)])
        with follow or contextlib.nullcontext():
            trainer.fit(stage, endless)
    if follow is not None:
        return int(follow.peaks[MARK].total())
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return _peak(profiler.kineto_results.events())


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


def shape_of(cfg: DictConfig, options: argparse.Namespace) -> Shape:
    length = int(cfg.data.packing.row_length)
    return Shape(int(cfg.data.packing.rows), length, options.supervised * length, options.images)


def measure(options: argparse.Namespace) -> Measured:
    """On every rank; the largest peak counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = configuration(options.overrides, folder, steps=3)
        cfg.plan_for.images_per_row, cfg.plan_for.supervised = options.images, options.supervised
        plan = make_plan(cfg, next((o.partition("=")[2] for o in options.overrides if o.startswith("trainer=")), ""))
        # A process of its own, so that nothing but the run is in its memory.
        command, ranks = [sys.executable], plan.engine.ranks
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "benchmarks.memory", *options.overrides, f"--rank-out={folder}"]
        command += [f"--images={options.images}", f"--supervised={options.supervised}"]
        result = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": str(options.threads or 1)}, capture_output=True, text=True
        )
        if result.returncode:
            raise UserError(f"a rank failed: {result.stderr.strip()[-2000:]}")
        return Measured(max(int(path.read_text()) for path in folder.glob("rank-*")), plan)


def results(found: Measured) -> Iterator[Table]:
    plan = found.plan
    table = Table(title=f"{plan.model}, {plan.engine.kind} on {plan.engine.ranks}, {plan.engine.precision}")
    for column in ("rows", "checkpointing", "estimated MB", "measured MB", "estimate / measured"):
        table.add_column(column, justify="right")
    estimate = f"{plan.memory.total / 1e6:,.1f}"
    table.add_row(str(plan.rows), plan.checkpointing, estimate, f"{found.peak / 1e6:,.1f}", f"{found.ratio:.3f}")
    yield table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py's configuration: model=..., trainer=...")
    parser.add_argument("--images", type=float, default=1.0, help="of a row")
    parser.add_argument("--supervised", type=float, default=0.5, help="share of positions with a target")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.rank_out:
            cfg = configuration(options.overrides, options.rank_out, steps=3)
            peak = peak_of(cfg, shape_of(cfg, options))
            (options.rank_out / f"rank-{os.environ.get('RANK', 0)}").write_text(str(peak))
            return 0
        for table in results(measure(options)):
            Console().print(table)
    except (UserError, HydraException) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
