"""How long an optimizer step takes, part by part, and what packing is worth.

    python -m perf.step
    python -m perf.step model=sphinx_sample_1k stage=pretrain_real --rows 8 --threads 2 --precision bf16

Overrides are those of train.py; the mixture is the stage's (default: finetune). Weights are random: time does not
depend on them. Everything runs one after the other in this process; in training, data workers run beside the model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.table import Table

from perf.harness import configuration, console, parser, run_command, table, where
from sphinx_pl.callbacks.throughput import peak_flops
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.sampling.packing import Row, first_fit_decreasing
from sphinx_pl.data.schema import Batch, Sample, SampleQuestion
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.planning.flops import TrainingFlops
from sphinx_pl.stages.optim import OptimConfig, build_optimizer

PARTS = (
    "data: planning",
    "data: decoding and collating",
    "vision",
    "decoder",
    "embedding, head and loss",
    "backward",
    "optimizer",
)


class Stopwatch:
    """Seconds by name; waits for the device before it reads the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def watch(self, module: torch.nn.Module, name: str) -> None:
        """Count the module's forward passes under `name`."""
        starts: list[float] = []
        module.register_forward_pre_hook(lambda *_: starts.append(self.now()))
        module.register_forward_hook(lambda *_: self._add(name, starts.pop()))

    def _add(self, name: str, start: float) -> None:
        self.seconds[name] += self.now() - start


@dataclass
class Bench:
    """The model, its data and where they run."""

    model: Sphinx
    datamodule: DataModule
    device: torch.device
    precision: str
    optim: OptimConfig

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def loss(self, batch: Batch) -> torch.Tensor:
        with self.autocast():
            losses = self.model.token_losses(batch)
        weights = batch.weights.flatten()[losses.index]
        return (losses.nll * weights).sum() / weights.sum().clamp(min=1e-8) + losses.extra


def build(arguments: argparse.Namespace) -> Bench:
    cfg = configuration("stage=finetune", *arguments.overrides)
    if arguments.rows:
        cfg.data.packing.micro_batch_rows = arguments.rows
    model_config = SphinxConfig.from_dict(cfg.model)
    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    processor = Processor.from_dict(values["processor"], values["tokenizer"], model_config)
    datamodule = DataModule(processor, values["sources"], {}, values["packing"], workers=0, seed=values["seed"])
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = Sphinx(model_config).to(device).train()
    model.freeze(part for part in model.parts() if part not in cfg.stage.train_parts)
    optim = OptimConfig(**OmegaConf.to_container(cfg.stage.optim, resolve=True))  # type: ignore[arg-type]
    return Bench(model, datamodule, device, arguments.precision, optim)


# -- the parts of a step ---------------------------------------------------------------------------------------------


def time_steps(bench: Bench, steps: int, warmup: int = 2) -> tuple[dict[str, float], dict[str, float]]:
    """Mean seconds of each part of a step, and what a step holds: tokens, images, ..., and flops."""
    model, datamodule = bench.model, bench.datamodule
    optimizer = build_optimizer(model.part_parameters(), bench.optim)
    planner = datamodule.planner()
    watch = Stopwatch(bench.device)
    if model.mixer is not None:
        watch.watch(model.mixer, "vision")
    watch.watch(model.decoder, "decoder")
    flops = TrainingFlops(model)
    content: dict[str, float] = defaultdict(float)
    for step in range(warmup + steps):
        if step == warmup:
            watch.seconds.clear()
            content.clear()
        with watch.time("data: planning"):
            plan = planner.plan()
        with watch.time("data: decoding and collating"):
            batches = [datamodule.collator(micro_batch.rows) for micro_batch in plan]
        for batch in batches:
            on_device = batch.to(bench.device)
            with watch.time("forward"):
                loss = bench.loss(on_device)
            with watch.time("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            content["flops"] += flops(batch)
            for key in ("tokens", "targets", "images", "samples", "positions"):
                content[key] += batch.counters.get(key, 0)
        with watch.time("optimizer"):
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad()
    seconds = {name: value / steps for name, value in watch.seconds.items()}
    seconds["embedding, head and loss"] = seconds.pop("forward") - seconds.get("vision", 0.0) - seconds["decoder"]
    return seconds, {name: value / steps for name, value in content.items()}


def parts_table(seconds: dict[str, float], content: dict[str, float], bench: Bench) -> Table:
    """Milliseconds and share of each part; rates and MFU below."""
    total = sum(seconds.values())
    peak = peak_flops(bench.device, torch.bfloat16 if bench.precision == "bf16" else torch.float32)
    compute = total - sum(value for name, value in seconds.items() if name.startswith("data"))
    named = {name: seconds[name] for name in PARTS if name in seconds} | {"step": total}
    rows = [[name, f"{1000 * value:.1f}", f"{value / total:.1%}"] for name, value in named.items()]
    title = (
        f"{bench.model.config.name}, {bench.precision}, {where(bench.device)}: a step of {content['positions']:,.0f} "
        f"positions ({1 - content['tokens'] / content['positions']:.1%} padding), {content['images']:.1f} images, "
        f"{content['samples']:.1f} questions"
    )
    rates = (
        f"{content['tokens'] / total:,.0f} tokens/s, {content['targets'] / total:,.0f} targets/s, "
        f"{content['images'] / total:,.1f} images/s; without data {content['tokens'] / compute:,.0f} tokens/s, "
        f"MFU {content['flops'] / compute / peak:.1%} of {peak / 1e12:.3g} TFLOP/s"
    )
    return table(title, ("part", "ms", "share"), rows, rates)


# -- packing against padding -----------------------------------------------------------------------------------------


def apart(samples: Sequence[Sample]) -> list[Sample]:
    """Each branch as a sample of its own, with the prefix and the images that it shared."""
    return [
        Sample(
            [],
            [
                SampleQuestion(
                    sample.prefix + question.ids,
                    [False] * len(sample.prefix) + question.supervised,
                    question.task,
                    question.key,
                )
            ],
            sample.images,
            sample.source,
        )
        for sample in samples
        for question in sample.questions
    ]


def shared_rows(step: list[Row], collator: Collator, rows: int) -> Iterator[tuple[list[Row], Collator]]:
    """As training has it: packed rows, questions about one image share one prefix."""
    yield step, collator


def packed_rows(step: list[Row], collator: Collator, rows: int) -> Iterator[tuple[list[Row], Collator]]:
    """Packed rows, but every question brings its image along."""
    left = apart([sample for row in step for sample in row])
    while left:
        packed, left = first_fit_decreasing(left, rows, collator.row_length)
        yield packed, collator


def padded_rows(step: list[Row], collator: Collator, rows: int) -> Iterator[tuple[list[Row], Collator]]:
    """One question a row, padded to the longest; as many rows as fit into a packed batch's number of positions."""
    batch: list[Sample] = []
    for sample in apart([sample for row in step for sample in row]):
        longest = max([sample.length, *(other.length for other in batch)])
        if batch and longest * (len(batch) + 1) > rows * collator.row_length:
            yield _one_a_row(batch, collator)
            batch = []
        batch.append(sample)
    yield _one_a_row(batch, collator)


def _one_a_row(batch: list[Sample], collator: Collator) -> tuple[list[Row], Collator]:
    longest = max(sample.length for sample in batch)
    return [[sample] for sample in batch], dataclasses.replace(collator, row_length=longest)


LAYOUTS: dict[str, Callable[[list[Row], Collator, int], Iterator[tuple[list[Row], Collator]]]] = {
    "packed rows, shared prefixes": shared_rows,
    "packed rows": packed_rows,
    "one sample a row, padded": padded_rows,
}


@dataclass
class Cost:
    """The cost of a layout for the steps that it got."""

    batches: int = 0
    positions: float = 0
    tokens: float = 0
    targets: float = 0
    images: float = 0
    data: float = 0
    compute: float = 0
    seen: list[str] = field(default_factory=list)


def compare_layouts(bench: Bench, steps: int) -> tuple[dict[str, Cost], int]:
    """Forward and backward over the same samples in each layout, step by step in turn; and their useful tokens.

    Useful are the tokens of the samples with every shared prefix counted once: the same for all layouts.
    """
    planner, collator = bench.datamodule.planner(), bench.datamodule.collator
    rows = bench.datamodule.packing.micro_batch_rows
    watch = Stopwatch(bench.device)
    costs = {name: Cost() for name in LAYOUTS}
    useful = 0
    for number in range(steps + 1):  # the first one warms up
        step = [row for micro_batch in planner.plan() for row in micro_batch.rows]
        if number == 1:
            costs = {name: Cost() for name in LAYOUTS}
            useful = 0
        useful += sum(sample.length for row in step for sample in row)
        for name, layout in LAYOUTS.items():
            cost = costs[name]
            for planned, collate in layout(step, collator, rows):
                start = watch.now()
                batch = collate(planned)
                decoded = watch.now()
                bench.loss(batch.to(bench.device)).backward()  # type: ignore[no-untyped-call]
                cost.compute += watch.now() - decoded
                bench.model.zero_grad()
                cost.data += decoded - start
                cost.batches += 1
                cost.seen += batch.keys
                for key in ("positions", "tokens", "targets", "images"):
                    setattr(cost, key, getattr(cost, key) + batch.counters.get(key, 0))
    first, *others = costs.values()
    if any(sorted(other.seen) != sorted(first.seen) or other.targets != first.targets for other in others):
        raise AssertionError("the layouts did not train on the same targets")
    return costs, useful


def layouts_table(costs: dict[str, Cost], useful: int) -> Table:
    """One row a layout, the padded one as the measure of speed."""
    slowest = costs["one sample a row, padded"].compute
    rows = [
        [
            name,
            str(cost.batches),
            f"{cost.positions:,.0f}",
            f"{1 - cost.tokens / cost.positions:.1%}",
            f"{cost.images:.0f}",
            f"{1000 * cost.data:,.0f}",
            f"{1000 * cost.compute:,.0f}",
            f"{useful / cost.compute:,.0f}",
            f"{slowest / cost.compute:.2f}x",
        ]
        for name, cost in costs.items()
    ]
    columns = ("layout", "batches", "positions", "padding", "images", "data ms", "compute ms", "useful tokens/s", "")
    caption = "useful: tokens of the samples, every shared prefix once. Data: decoding and collating in one process."
    return table("The same samples, forward and backward", columns, rows, caption)


def measure(options: argparse.Namespace) -> None:
    """Prints both tables."""
    bench = build(options)
    costs, useful = compare_layouts(bench, max(1, options.steps // 2))
    seconds, content = time_steps(bench, options.steps)
    console().print(parts_table(seconds, content, bench))
    console().print(layouts_table(costs, useful))


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__, "model=..., stage=..., data....=...")
    command.add_argument("--rows", type=int, help="rows of a batch (default: the configuration's)")
    command.add_argument("--steps", type=int, default=10, help="steps to measure; half as many for the layouts")
    command.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return run_command(command, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
