"""What watching a run costs: the callbacks and the losses by task and source, with the logger, as a share of a step.

    python -m benchmarks.watching
    python -m benchmarks.watching model=sphinx_sample_1k stage=pretrain_real stage.accumulate=4 --pairs 20

Overrides are those of train.py. One run, in which blocks of steps (from one log to the next) alternate: in one
everything watches, in the next nothing does. Two answers: the time inside of what watches, added up, over the time of
the steps; and the time of a block over that of its neighbour, which has the whole difference in it and all noise too.

On a CPU all times are processor time of the main thread, to which other programs on the machine do not add; waiting
for data is then no part of a step. On a GPU they are the host's wall time; what it spends waiting for the GPU at a log
is in them, though the GPU then works, so the first is an upper bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks.step import where
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.train_loader import TrainLoader
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER, MISTAKES, register_resolvers, report
from sphinx_pl.stages import Stage

RESULTS = ("export", "checkpoint", "predictions")
"""Callbacks that are not for watching steps: the run's results, and answers after a validation."""
ONCE = ("setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_exception")
"""Hooks that are no part of any step."""


@dataclass
class Block:
    """Steps from one log to the next: seconds of all of them, and those spent watching, by what watched."""

    watched: bool
    seconds: float = 0.0
    inside: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass
class Cost:
    """What a run of alternating blocks found; `blocks` without those that warmed up."""

    blocks: list[Block]
    steps: int
    """In each block."""

    @property
    def step(self) -> float:
        """Seconds of a step without watching, the median block's."""
        return statistics.median(block.seconds for block in self.blocks if not block.watched) / self.steps

    @property
    def inside(self) -> dict[str, float]:
        """Seconds of a step inside of what watches, by its name, the median block's."""
        watched = [block for block in self.blocks if block.watched]
        names = dict.fromkeys(name for block in watched for name in block.inside)
        return {
            name: statistics.median(block.inside.get(name, 0.0) for block in watched) / self.steps for name in names
        }

    @property
    def share(self) -> float:
        """Time inside of what watches over the time of a step without it."""
        return sum(self.inside.values()) / self.step

    @property
    def difference(self) -> tuple[float, float, float]:
        """A watched block's time over its neighbour's that is not, minus 1: median and quartiles of the pairs."""
        pairs = [
            sorted(pair, key=lambda block: block.watched)
            for pair in zip(self.blocks[::2], self.blocks[1::2], strict=True)
        ]
        ratios = [watched.seconds / plain.seconds - 1 for plain, watched in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return middle, low, high


class Switch(L.Callback):
    """Turns all watching on and off, block by block, and times the blocks. The first of the callbacks."""

    def __init__(self, steps: int, clock: Callable[[], float]) -> None:
        self.steps = steps
        self.clock = clock
        self.blocks: list[Block] = []
        self._since = 0.0
        self._inner = False

    @property
    def on(self) -> bool:
        return not self.blocks or self.blocks[-1].watched

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Stage)
        for name in ("_count", "_log_steps"):
            setattr(pl_module, name, self.timed("losses by task and source", getattr(pl_module, name)))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        first = trainer.fit_loop.total_batch_idx % trainer.accumulate_grad_batches == 0
        if first and trainer.global_step % self.steps == 0:
            now = self._close()
            self.blocks.append(Block(watched=len(self.blocks) % 4 in (0, 3)))  # on off off on: neither is always first
            self._since = now

    def _close(self) -> float:
        now = self.clock()
        if self.blocks:
            self.blocks[-1].seconds = now - self._since
        return now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which does nothing in blocks that are not watched. One inside another is counted once."""

        def call(*args: Any, **options: Any) -> Any:
            if not self.on:
                return None
            if self._inner or not self.blocks:
                return function(*args, **options)
            self._inner = True
            start = self.clock()
            try:
                return function(*args, **options)
            finally:
                self.blocks[-1].inside[name] += self.clock() - start
                self._inner = False

        return call


class Asked(L.Callback):
    """What the loader tells a watcher is timed too. The last of the callbacks, since it is they who ask for it."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.train_dataloader, TrainLoader):
            loader = trainer.train_dataloader
            loader.asked = self.switch.timed("Throughput", loader.asked)


def measure(
    stage: Stage, data: DataModule, make_trainer: Callable[..., L.Trainer], callbacks: Sequence[L.Callback], pairs: int
) -> Cost:
    """Train for `pairs` pairs of blocks after one that warms up.

    Args:
        make_trainer: from `callbacks` and `max_steps`; its `log_every_n_steps` is a block's length.
    """
    plain = make_trainer(callbacks=[], max_steps=1)
    steps = plain.log_every_n_steps
    switch = Switch(steps, time.thread_time if plain.strategy.root_device.type == "cpu" else time.perf_counter)
    for callback in callbacks:
        for name in dir(type(callback)):
            if (
                name.startswith("on_")
                and name not in ONCE
                and getattr(type(callback), name) is not getattr(L.Callback, name, None)
            ):
                setattr(callback, name, switch.timed(type(callback).__name__, getattr(callback, name)))
    trainer = make_trainer(callbacks=[switch, *callbacks, Asked(switch)], max_steps=2 * (pairs + 1) * steps)
    trainer.fit(stage, data)
    return Cost(switch.blocks[2:], steps)


def build(options: argparse.Namespace, folder: Path) -> tuple[Stage, DataModule, Callable[..., L.Trainer], list[Any]]:
    """The stage, its data, a trainer and the callbacks that watch, as train.py would have them."""
    overrides = [
        "stage=finetune",
        "stage.init_from=null",
        *options.overrides,
        "trainer.val_check_interval=1000000",
        "+trainer.limit_val_batches=0",
        f"trainer.default_root_dir={folder}",
        f"logger.csv.save_dir={folder}",
        f"callbacks.provenance.config={folder / 'config.yaml'}",
    ]
    register_resolvers()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = compose("train", overrides)
    if options.log_every:
        cfg.trainer.log_every_n_steps = options.log_every
    OmegaConf.save(OmegaConf.create({"benchmark": "watching"}), folder / "config.yaml")
    model = SphinxConfig.from_dict(cfg.model)
    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    data = DataModule.from_config(values | {"val_sources": {}}, model)
    torch.manual_seed(0)
    optim: dict[str, Any] = OmegaConf.to_container(cfg.stage.optim, resolve=True)  # type: ignore[assignment]
    stage = Stage(model, cfg.stage.name, list(cfg.stage.train_parts), optim, cfg.stage.max_steps)

    def trainer(callbacks: list[L.Callback], max_steps: int) -> L.Trainer:
        settings: DictConfig = cfg.trainer.copy()
        settings.max_steps = max_steps
        loggers = [instantiate(entry) for entry in cfg.logger.values() if entry]
        made: L.Trainer = instantiate(settings, callbacks=callbacks, logger=loggers)
        return made

    watching = [instantiate(entry) for name, entry in cfg.callbacks.items() if entry and name not in RESULTS]
    return stage, data, trainer, watching


def cost_table(cost: Cost, realistic: float) -> Table:
    """A row for each that watches, and their sum."""
    table = Table(title="What watching costs")
    for name in ("", "ms a step", "share of a step", f"of a step of {realistic:g} s"):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, seconds: float) -> None:
        table.add_row(name, f"{1000 * seconds:.3f}", f"{seconds / cost.step:.2%}", f"{seconds / realistic:.3%}")

    for name, seconds in cost.inside.items():
        row(name, seconds)
    table.add_section()
    row("all", sum(cost.inside.values()))
    return table


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("overrides", nargs="*", help="of train.py's configuration: model=..., stage=..., data....=...")
    made.add_argument("--pairs", type=int, default=20, help="pairs of blocks to measure, after one that warms up")
    made.add_argument("--log-every", type=int, help="steps of a block (default: the trainer's log_every_n_steps)")
    made.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    made.add_argument("--step", type=float, default=1.0, help="seconds of a step to compare with")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    try:
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
            stage, data, trainer, watching = build(options, Path(folder))
            for callback in watching:
                if hasattr(callback, "console"):
                    callback.console = Console(file=nowhere)
            cost = measure(stage, data, trainer, watching, options.pairs)
    except MISTAKES as error:
        return report(error)
    middle, low, high = cost.difference
    console.print(
        f"{stage.config.name}, {where(stage.device)}: a step of {1000 * cost.step:.1f} ms, a log every {cost.steps}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(cost_table(cost, options.step))
    console.print(
        f"watched against not watched, {options.pairs} pairs of blocks: {middle:+.2%} (quartiles {low:+.2%}, "
        f"{high:+.2%})",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
