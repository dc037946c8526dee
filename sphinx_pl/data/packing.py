"""Samples -> rows -> windows -> batches.

A *window* is what one optimizer step consumes: `rows` packed rows of `row_length` positions on every rank and
accumulation step. It is planned as a whole, before any image is decoded, so that text and images are both in it and
its number of targets is known before the first backward.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.images import load_image
from sphinx_pl.data.mixture import Mixture
from sphinx_pl.data.record import IGNORE, IMAGE_SLOT, Batch, Branch, ImageRef, Sample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.errors import UserError

TASK_NAMES = list(TASKS)
WEIGHTINGS: dict[str, Callable[[int], float]] = {
    "token": lambda targets: 1.0,
    # InternVL's "square averaging": between a mean over tokens and a mean over answers.
    "sqrt": lambda targets: 1.0 / math.sqrt(targets),
}
Row = list[Sample]


@dataclass
class PackingConfig:
    """`rows` of `row_length` tokens per micro-batch; at most `images_per_row` images in a row (0: no bound)."""

    row_length: int
    rows: int
    images_per_row: int = 0
    weighting: str = "token"
    # Drawn beyond a window's capacity, as a share of it: more choice for the packer, at the price of order.
    look_ahead: float = 0.5

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise UserError(f"data.packing.weighting='{self.weighting}' must be one of {', '.join(WEIGHTINGS)}")
        if self.row_length < 1 or self.rows < 1:
            raise UserError(f"data.packing: row_length={self.row_length} and rows={self.rows} must be positive")


def first_fit_decreasing(
    samples: Sequence[Sample], rows: int, row_length: int, images_per_row: int = 0, first: int = 0
) -> tuple[list[Row], list[Sample]]:
    """At most `rows` rows, and what did not fit. The `first` samples are placed before any other, in their order."""
    packed: list[Row] = []
    free: list[int] = []
    images: list[int] = []
    left: list[Sample] = []
    rest = sorted(samples[first:], key=lambda sample: -sample.length)  # stable: equal lengths keep their order
    for sample in [*samples[:first], *rest]:
        for i in range(len(packed)):
            if free[i] >= sample.length and (
                not images_per_row or images[i] + len(sample.images) <= images_per_row or not sample.images
            ):
                packed[i].append(sample)
                free[i] -= sample.length
                images[i] += len(sample.images)
                break
        else:
            if len(packed) < rows and sample.length <= row_length:
                packed.append([sample])
                free.append(row_length - sample.length)
                images.append(len(sample.images))
            else:
                left.append(sample)
    return packed, left


def deal(rows: list[Row], bins: int) -> list[list[Row]]:
    """Rows over `bins` micro-batches, equal in number, images spread evenly (most images first, to and fro)."""
    order = sorted(rows, key=lambda row: -sum(len(sample.images) for sample in row))
    dealt: list[list[Row]] = [[] for _ in range(bins)]
    for i, row in enumerate(order):
        turn, place = divmod(i, bins)
        dealt[place if turn % 2 == 0 else bins - 1 - place].append(row)
    return dealt


@dataclass
class WindowPlan:
    """This rank's micro-batches of one window."""

    number: int
    micro_batches: list[list[Row]]


class Planner:
    """An endless iterator of windows: the sampler of the training loader. Every rank plans the same, takes its part.

    The state is that of the mixture and the samples that were drawn but not placed yet. Loaders run ahead of training,
    so the state after every planned window is kept until `consumed` says that the window has been trained on.
    """

    def __init__(
        self, mixture: Mixture, config: PackingConfig, accumulate: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        self.mixture = mixture
        self.config = config
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.pending: list[Sample] = []
        self.number = 0
        self._states: dict[int, tuple[dict[str, Any], list[Sample]]] = {0: (mixture.state_dict(), [])}

    def __iter__(self) -> Iterator[WindowPlan]:
        while True:
            yield self.plan()

    def plan(self) -> WindowPlan:
        config = self.config
        bins = self.accumulate * self.world_size
        rows = config.rows * bins
        capacity = rows * config.row_length
        pool = list(self.pending)
        carried = len(pool)
        drawn_in_vain = 0
        missing = capacity * (1 + config.look_ahead) - sum(sample.length for sample in pool)
        while missing > 0:
            before = len(pool)
            drawn_in_vain = self._draw(pool, None, drawn_in_vain)
            missing -= sum(sample.length for sample in pool[before:])
        # A small window could lack a modality with a small share: ask for it by name.
        musts = []
        for modality in self.mixture.modalities:
            while not any(_modality(sample) == modality for sample in pool):
                drawn_in_vain = self._draw(pool, modality, drawn_in_vain)
            found = [sample for sample in pool if _modality(sample) == modality]
            # A single row has to hold both: there the shortest, else the one that has waited longest.
            musts.append(min(found, key=lambda sample: sample.length) if rows == 1 else found[0])
        if rows == 1 and sum(sample.length for sample in musts) > config.row_length:
            raise UserError(
                f"data.packing: one row of {config.row_length} positions cannot hold an image sample and a text "
                "sample, which every step needs: raise rows, row_length or stage.accumulate"
            )
        # Then what waited longest, so that nothing waits for ever; the rest by length.
        waited = [sample for sample in pool[:carried] if not any(sample is must for must in musts)]
        others = [sample for sample in pool[carried:] if not any(sample is must for must in musts)]
        packed, self.pending = first_fit_decreasing(
            [*musts, *waited, *others],
            rows,
            config.row_length,
            config.images_per_row,
            first=len(musts) + len(waited),
        )
        packed += [[] for _ in range(rows - len(packed))]
        mine = deal(packed, bins)[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]
        self.number += 1
        self._states[self.number] = (self.mixture.state_dict(), self.pending)
        return WindowPlan(self.number, mine)

    def _draw(self, pool: list[Sample], modality: str | None, in_vain: int) -> int:
        """Add a draw's samples to the pool; returns how many draws in a row gave none (of `modality`)."""
        for sample in self.mixture.draw(modality):
            if sample.length > self.config.row_length:
                stream = self.mixture.streams[sample.source]
                stream.counts["skipped/longer_than_row"] += len(sample.branches)
            else:
                pool.append(sample)
                in_vain = -1 if modality in (None, _modality(sample)) else in_vain
        if in_vain >= 1000:
            what = f"{modality} sample (is data.sources.*.modality right?)" if modality else "usable sample"
            raise UserError(
                f"data: 1000 draws in a row gave no {what}; skipped so far: {self.mixture.counts}: "
                "check the sources' files, or raise data.packing.row_length"
            )
        return in_vain + 1

    def consumed(self, number: int) -> None:
        """Window `number` has been trained on: earlier states are not needed any more."""
        for old in [n for n in self._states if n < number]:
            del self._states[old]

    def state_dict(self) -> dict[str, Any]:
        """Where to go on after the last consumed window; only lists, dicts, strings and numbers."""
        number = min(self._states)
        mixture, pending = self._states[number]
        return {"number": number, "mixture": mixture, "pending": [_to_plain(sample) for sample in pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state["mixture"])
        self.number = state["number"]
        self.pending = [_from_plain(plain) for plain in state["pending"]]
        self._states = {self.number: (self.mixture.state_dict(), self.pending)}


def _modality(sample: Sample) -> str:
    return "image" if sample.images else "text"


def _to_plain(sample: Sample) -> dict[str, Any]:
    return {
        "prefix": list(sample.prefix),
        "branches": [[list(b.ids), list(b.supervised), b.task, b.key] for b in sample.branches],
        "images": [[image.path, image.offset, image.size] for image in sample.images],
        "source": sample.source,
        "seen": [list(views) for views in sample.seen],
    }


def _from_plain(plain: dict[str, Any]) -> Sample:
    return Sample(
        plain["prefix"],
        [Branch(*branch) for branch in plain["branches"]],
        tuple(ImageRef(*image) for image in plain["images"]),
        plain["source"],
        tuple(tuple(views) for views in plain.get("seen", ())),
    )


@dataclass
class Collator:
    """A planned micro-batch -> `Batch`: decodes images, masks the slots of those that cannot be read.

    Args:
        row_length: T. image_size: S, pixels a side.
    """

    row_length: int
    image_size: int
    weighting: str = "token"

    def __call__(self, rows: Sequence[Row]) -> Batch:
        b, t = len(rows), self.row_length
        ids = torch.zeros(b, t, dtype=torch.int64)
        labels = torch.full((b, t), IGNORE, dtype=torch.int64)
        weights = torch.zeros(b, t)
        segments = torch.zeros(b, t, dtype=torch.int32)
        branches = torch.zeros(b, t, dtype=torch.int32)
        positions = torch.zeros(b, t, dtype=torch.int64)
        tasks = torch.zeros(b, t, dtype=torch.int32)
        pixels: list[torch.Tensor] = []
        slots: list[torch.Tensor] = []
        seen: list[tuple[bool, ...]] = []
        keys: list[str] = []
        counters: Counter[str] = Counter()
        weigh = WEIGHTINGS[self.weighting]

        for row, samples in enumerate(rows):
            at = 0
            for segment, sample in enumerate(samples, start=1):
                images, readable = self._decode(sample, counters)
                pixels += images
                seen += sample.seen
                counters["samples"] += len(sample.branches)
                counters["images"] += len(images)
                counters[f"modality/{_modality(sample)}"] += int(readable)
                end = at + sample.length
                segments[row, at:end] = segment
                prefix = len(sample.prefix)
                positions[row, at : at + prefix] = torch.arange(prefix)
                flat = list(sample.prefix)
                at += prefix
                for number, branch in enumerate(sample.branches, start=1):
                    n = len(branch.ids)
                    positions[row, at : at + n] = torch.arange(prefix, prefix + n)
                    branches[row, at : at + n] = number
                    flat += branch.ids
                    keys.append(f"{sample.source}/{branch.key}")
                    targets = sum(branch.supervised)
                    if readable and targets:
                        flags = torch.tensor(branch.supervised[1:], dtype=torch.bool)
                        labels[row, at : at + n - 1][flags] = torch.tensor(branch.ids[1:], dtype=torch.int64)[flags]
                        weights[row, at : at + n - 1][flags] = weigh(targets)
                        tasks[row, at : at + n] = TASK_NAMES.index(branch.task)
                    at += n
                begin = end - sample.length
                tokens = torch.tensor(flat, dtype=torch.int64)
                slots.append(row * t + begin + (tokens == IMAGE_SLOT).nonzero().flatten())
                ids[row, begin:end] = tokens.clamp(min=0)

        size = self.image_size
        counters["tokens"] = int((segments > 0).sum())
        counters["positions"] = b * t
        counters["targets"] = int((labels != IGNORE).sum())
        return Batch(
            input_ids=ids,
            labels=labels,
            weights=weights,
            segment_ids=segments,
            branch_ids=branches,
            position_ids=positions,
            task_ids=tasks,
            pixels=torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size, dtype=torch.uint8),
            image_slots=torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64),
            seen_views=torch.tensor(seen) if seen else None,
            tasks=TASK_NAMES,
            keys=keys,
            counters={key: float(value) for key, value in counters.items()},
        )

    def _decode(self, sample: Sample, counters: Counter[str]) -> tuple[list[torch.Tensor], bool]:
        images, readable = [], True
        for ref in sample.images:
            try:
                images.append(load_image(ref, self.image_size))
            except BadSample as error:
                readable = False
                counters[f"skipped/{sample.source}/{error.reason}"] += len(sample.branches)
                images.append(torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8))
        return images, readable

    def window(self, plan: WindowPlan) -> list[Batch]:
        """The window's micro-batches, each with the weight of the whole window."""
        batches = [self(rows) for rows in plan.micro_batches]
        weight = sum(float(batch.weights.sum()) for batch in batches)
        for i, batch in enumerate(batches):
            batch.window_weight = weight
            batch.window_end = i == len(batches) - 1
            batch.window = plan.number
        return batches
