"""How full packed rows are, beside padding, and how evenly the work of a step falls on the ranks.

    python -m perf.packing
    python -m perf.packing --rows 4 --steps 100

Nothing is trained and no image is decoded: the planner knows lengths without. The sample mixtures are the real ones,
made for this run; the paper's are simulated by the histograms below. Every partition is a rank of its own here.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from omegaconf import OmegaConf

from perf.harness import configuration, console, parser, run_command, table
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sample_world.writer import build as build_sample
from sphinx_pl.data.sampling.mixture import Mixture
from sphinx_pl.data.sampling.packing import PackingConfig
from sphinx_pl.data.sampling.partition import Partition
from sphinx_pl.data.sampling.planner import Planner
from sphinx_pl.data.schema import ImageRef, Sample, SampleQuestion
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.planning.flops import TrainingFlops

IMAGE_TOKENS = 291
"""An image of sphinx_7b has 289 visual tokens with a start and an end (measured)."""


@dataclass(frozen=True)
class Simulated:
    """A source: how many samples it has for every one of the others', and how long they are.

    `bands`: (weight, fewest, most) text tokens, every number in a band as likely as any other.
    """

    share: float
    images: int
    bands: tuple[tuple[float, int, int], ...]

    def length(self, rng: random.Random) -> int:
        [(_, low, high)] = rng.choices(self.bands, [band[0] for band in self.bands])
        return rng.randint(low, high) + self.images * IMAGE_TOKENS


# A document longer than 2,048 tokens is cut there, so many pieces have just that length.
_DOCUMENTS = ((0.5, 2048, 2048), (0.25, 600, 2047), (0.25, 60, 599))

SIMULATED: dict[str, dict[str, Simulated]] = {
    # Shares assumed: 16 image-text pairs for every text. Lengths assumed: alt texts of web pairs and documents as they
    # usually are, the pairs behind BOS without a system text.
    "paper, pretraining": {
        "pairs": Simulated(16, 1, ((0.6, 6, 20), (0.3, 21, 40), (0.1, 41, 128))),
        "text": Simulated(1, 0, _DOCUMENTS),
    },
    # Shares published: thousands of samples of LLaVA-1.5's mixture (arXiv 2310.03744, table 7), questions about one
    # image as one sample. Lengths assumed, with the conversation's system text of about 35 tokens.
    "paper, finetuning": {
        "vqa": Simulated(310, 1, ((0.7, 40, 120), (0.3, 121, 200))),  # VQAv2, GQA, OKVQA, OCRVQA, A-OKVQA
        "llava": Simulated(158, 1, ((0.6, 300, 500), (0.4, 501, 700))),
        "grounding": Simulated(134, 1, ((0.5, 80, 250), (0.35, 251, 600), (0.15, 601, 1200))),  # RefCOCO, VG
        "ocr": Simulated(22, 1, ((0.7, 60, 150), (0.3, 151, 900))),  # TextCaps
        "sharegpt": Simulated(40, 0, ((0.5, 2048, 2048), (0.4, 500, 2047), (0.1, 60, 499))),
    },
}


class SimulatedMixture:
    """A mixture whose sources are histograms. It draws as `Mixture` does."""

    exhausted = finite = False
    modalities = ("image", "text")

    def __init__(self, sources: dict[str, Simulated], partition: int, row_length: int) -> None:
        self.sources = sources
        self.row_length = row_length
        self.rng = random.Random(partition)
        self.drawn = dict.fromkeys(sources, 0)
        self.streams: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()

    def draw(self, modality: str | None = None) -> list[Sample]:
        wanted = {None: (0, 1), "text": (0,), "image": (1,)}[modality]
        names = [name for name, source in self.sources.items() if source.images in wanted]
        shares = sum(source.share for source in self.sources.values())
        total = sum(self.drawn.values()) + 1
        name = max(names, key=lambda n: self.sources[n].share / shares * total - self.drawn[n])
        self.drawn[name] += 1
        source = self.sources[name]
        length = min(source.length(self.rng), self.row_length)
        branch = SampleQuestion([1] * length, [False] * (length - 1) + [True], "chat", name)
        return [Sample([], [branch], (ImageRef(""),) * source.images, name)]

    def state_dict(self) -> dict[str, Any]:
        return {"streams": {}}


MakeMixture = Callable[[int, int], Mixture]
"""The mixture of (partition, partitions)."""


def flops_of(cfg: Any) -> TrainingFlops:
    """FLOPs of a configuration's model in its stage: frozen encoders run forward only."""
    with torch.device("meta"):
        model = Sphinx(SphinxConfig.from_dict(cfg.model))
    model.freeze(part for part in model.parts() if part not in cfg.stage.train_parts)
    return TrainingFlops(model)


@dataclass
class Case:
    """A mixture and the rows of every rank."""

    name: str
    mixture: MakeMixture
    packing: PackingConfig
    flops: TrainingFlops


def simulated_cases(rows: int) -> Iterator[Case]:
    flops = flops_of(configuration("experiment=none", "model=sphinx_7b"))
    for name, sources in SIMULATED.items():
        for row_length in (2048, 4096):

            def mixture(
                partition: int, partitions: int, sources: dict[str, Simulated] = sources, row_length: int = row_length
            ) -> Mixture:
                return cast(Mixture, SimulatedMixture(sources, partition, row_length))

            yield Case(name, mixture, PackingConfig(row_length, rows), flops)


def sample_cases(root: Path, rows: int) -> Iterator[Case]:
    """The sample's own mixtures, with its own row length (as long as its longest sample) and one of twice that."""
    for stage, longer in itertools.product(("pretrain_real", "finetune"), (1, 2)):
        cfg = configuration(f"stage={stage}", f"data.root={root}", f"data.packing.micro_batch_rows={rows}")
        cfg.data.packing.row_length *= longer
        values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
        processor = Processor.from_dict(values["processor"], values["tokenizer"], SphinxConfig.from_dict(cfg.model))
        module = DataModule(processor, values["sources"], {}, values["packing"], seed=values["seed"])

        def mixture(partition: int, partitions: int, module: DataModule = module) -> Mixture:
            length = module.packing.row_length
            return Mixture(
                module.sources,
                module.processor,
                module.seed,
                length,
                module.mixing,
                partition=partition,
                partitions=partitions,
            )

        yield Case(f"sample, {stage}", mixture, module.packing, flops_of(cfg))


# -- padding ---------------------------------------------------------------------------------------------------------


def padded(case: Case, steps: int, by_length: bool) -> float:
    """The share of useful tokens where every micro-batch is padded to its longest sample.

    A micro-batch has as many samples as fit into the positions of a packed one. `by_length`: they are sorted within
    what the packer's look-ahead would see, which makes neighbours alike, and steps homogeneous.
    """
    mixture, positions = case.mixture(0, 1), case.packing.micro_batch_rows * case.packing.row_length
    tokens = used = 0
    for _ in range(steps):
        lengths: list[int] = []
        while sum(lengths) < positions * (1 + case.packing.look_ahead):
            lengths += [s.length for s in mixture.draw() if s.length <= case.packing.row_length]
        batch: list[int] = []
        for length in [*(sorted(lengths) if by_length else lengths), positions + 1]:
            longest = max([length, *batch])
            if batch and longest * (len(batch) + 1) > positions:
                tokens, used = tokens + sum(batch), used + max(batch) * len(batch)
                batch = []
            batch.append(length)
    return tokens / used


# -- packing ---------------------------------------------------------------------------------------------------------


@dataclass
class Packed:
    """The content of all steps and ranks. Work is relative to the mean of its step."""

    useful: float
    slowest: float
    """The slowest rank's work, mean of the steps."""
    worst: float
    """The same in the worst step."""
    images: float
    """Images of the rank that has most, relative to the mean."""
    without: int
    """Ranks in steps that lacked a modality of the mixture."""


def packed(case: Case, steps: int, partitions: int) -> Packed:
    """Through the planners of `partitions` ranks, each with a partition of its own."""

    def partition(number: int) -> Partition:
        return Partition(case.mixture(number, partitions), case.packing)

    planners = [
        Planner(partition, partitions, case.packing, rank=rank, world_size=partitions) for rank in range(partitions)
    ]
    positions = case.packing.micro_batch_rows * case.packing.row_length
    tokens = 0
    slowest: list[float] = []
    most: list[float] = []
    without = 0
    for _ in range(steps):
        images, pairs = [], []
        for planner in planners:
            samples = [sample for plan in planner.plan() for row in plan.rows for sample in row]
            planner.consumed(planner.number)
            tokens += sum(sample.length for sample in samples)
            images.append(sum(len(sample.images) for sample in samples))
            pairs.append(sum(sample.pairs for sample in samples))
            without += {bool(sample.images) for sample in samples} != {True, False}
        work = [case.flops.of(positions, *content) for content in zip(pairs, itertools.repeat(0), images)]
        slowest.append(max(work) * partitions / sum(work) - 1)
        most.append(max(images) * partitions / sum(images) - 1)
    useful = tokens / (steps * partitions * positions)
    return Packed(useful, sum(slowest) / steps, max(slowest), sum(most) / steps, without)


def print_table(options: argparse.Namespace) -> None:
    """Prints a row for every mixture, row length and number of ranks."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, SPHINX_CACHE=f"{folder}/cache"):
        root = options.root or Path(folder) / "sample"
        if not options.root:
            build_sample(root, scale=0.2)
        rows = []
        for case in [*sample_cases(root, options.rows), *simulated_cases(options.rows)]:
            plain, by_length = (padded(case, options.steps, way) for way in (False, True))
            for partitions in options.partitions:
                result = packed(case, max(1, options.steps // (4 if partitions > 8 else 1)), partitions)
                shares = [f"{share:.1%}" for share in (plain, by_length)]
                balance = (result.slowest, result.worst, result.images) if partitions > 1 else ()
                above = [f"+{share:.1%}" for share in balance] or [""] * 3
                rows.append(
                    [
                        case.name,
                        f"{case.packing.row_length:,}",
                        *shares,
                        str(partitions),
                        f"{result.useful:.1%}",
                        *above,
                    ]
                )
    columns = ("mixture", "row", "padded", "sorted, padded", "ranks", "packed", "work", "worst", "images")
    caption = "work, worst step, images: the slowest rank above the mean"
    console().print(table(f"Useful tokens, {options.rows} rows a rank", columns, rows, caption))


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__)
    command.add_argument("--rows", type=int, default=8, help="of every rank in a step")
    command.add_argument("--steps", type=int, default=64, help="optimizer steps to plan, a quarter of them with 64")
    command.add_argument(
        "--partitions", type=int, nargs="*", default=[1, 8, 64], help="numbers of partitions, one a rank"
    )
    command.add_argument("--root", type=Path, help="sample data (default: made for the run, at a fifth of its size)")
    return run_command(command, print_table, arguments)


if __name__ == "__main__":
    sys.exit(main())
