"""Samples -> rows -> windows -> batches.

A *window* is what one optimizer step consumes: `rows` packed rows of `row_length` positions on every rank and
accumulation step. It is planned as a whole, before any image is decoded, so that text and images are both in it. Each
lane (`sphinx_pl.data.sampling.stream`) plans its own rows of every window.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sphinx_pl.data.images import load_image
from sphinx_pl.data.sampling.config import MODALITIES
from sphinx_pl.data.sampling.mixture import Mixture
from sphinx_pl.data.schema import IGNORE, IMAGE_SLOT, Batch, Branch, ImageRef, Sample
from sphinx_pl.data.skip import BadSample, counter_of, split_counter
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.config import within
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)

TASK_NAMES = list(TASKS)
WEIGHTINGS: dict[str, Callable[[int], float]] = {
    "token": lambda targets: 1.0,
    # InternVL's "square averaging": between a mean over tokens and a mean over answers.
    "sqrt": lambda targets: 1.0 / math.sqrt(targets),
}
Row = list[Sample]
_WINDOWS_TO_TELL = 100
"""After so many windows the shares have settled."""
DRAWS_IN_VAIN = 1000
MAX_WAITING = 8
"""Samples for so many windows may wait for their turn. Where one modality is rarer than that, windows go without it."""


@dataclass
class PackingConfig:
    """`rows` of `row_length` tokens per micro-batch; at most `images_per_row` images in a row (0: no bound)."""

    row_length: int = within(at_least=1, at_most=2**24)
    rows: int = within(at_least=1, at_most=2**16)
    images_per_row: int = within(0, at_least=0, at_most=2**16)
    weighting: str = "token"
    # Drawn beyond a window's capacity, as a share of it: more choice for the packer, at the price of order.
    look_ahead: float = within(0.5, at_least=0, at_most=1000)

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise UserError(f"data.packing.weighting='{self.weighting}' must be one of {', '.join(WEIGHTINGS)}")


def first_fit_decreasing(
    samples: Sequence[Sample], rows: int, row_length: int, images_per_row: int = 0
) -> tuple[list[Row], list[Sample]]:
    """At most `rows` rows, and what did not fit."""
    packed: list[Row] = []
    free: list[int] = []
    images: list[int] = []
    left: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: -sample.length):  # stable: equal lengths keep their order
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


# Candidates for a row's rest: the number bounds the planner's time, not the result, which is full long before.
_CANDIDATES = 256


def fullest_rows(
    samples: Sequence[Sample], rows: int, row_length: int, images_per_row: int = 0, first: int = 1
) -> tuple[list[Row], list[Sample]]:
    """At most `rows` rows, and what is left over, in order.

    Each row begins with the next sample in order (the first row with `first` of them), so that none waits for long; the
    rest of a row are those that fill it best together, earlier ones rather than later ones. It fills more than
    first-fit decreasing does, and takes a stream as it comes.
    """
    left = list(samples)
    packed: list[Row] = []
    while left and len(packed) < rows:
        count = 1 if packed else first
        row, left = left[:count], left[count:]
        room = row_length - sum(sample.length for sample in row)
        images = images_per_row - sum(len(sample.images) for sample in row) if images_per_row else None
        chosen = set(_fullest(left[:_CANDIDATES], room, images))
        row += [left[i] for i in sorted(chosen)]
        left = [sample for i, sample in enumerate(left) if i not in chosen]
        packed.append(row)
    return packed, left


def _fullest(samples: Sequence[Sample], room: int, images: int | None) -> list[int]:
    """Which samples come nearest to `room` together, with at most so many images (None: any number)."""
    # Bit n of reach[i][k]: some of the first i samples have n tokens together, and k images where these are bounded.
    inside = (1 << (room + 1)) - 1
    reach = [[1] + [0] * max(images or 0, 0)]
    weights = [len(sample.images) if images is not None else 0 for sample in samples]
    for sample, weight in zip(samples, weights, strict=True):
        if any(bits >> room for bits in reach[-1]):  # full
            break
        before, n = reach[-1], sample.length
        taken = [before[k - weight] << n & inside if k >= weight else 0 for k in range(len(before))]
        reach.append([a | b for a, b in zip(before, taken, strict=True)])
    total, used = max((bits.bit_length() - 1, k) for k, bits in enumerate(reach[-1]))
    chosen = []
    for i in range(len(reach) - 1, 0, -1):
        if not reach[i - 1][used] >> total & 1:  # not without this one
            chosen.append(i - 1)
            total, used = total - samples[i - 1].length, used - weights[i - 1]
    return chosen


def deal(rows: list[Row], bins: int) -> list[list[Row]]:
    """Rows over `bins` micro-batches, equal in number, images spread evenly (most images first, to and fro)."""
    order = sorted(rows, key=lambda row: -sum(len(sample.images) for sample in row))
    dealt: list[list[Row]] = [[] for _ in range(bins)]
    for i, row in enumerate(order):
        turn, place = divmod(i, bins)
        dealt[place if turn % 2 == 0 else bins - 1 - place].append(row)
    return dealt


def rows_of_lanes(rows: int, lanes: int, world_size: int) -> list[int]:
    """How many of the rows of an optimizer step each lane plans, so that ranks get equally many.

    Raises:
        UserError: they do not divide so.
    """
    if rows < lanes:
        raise UserError(
            f"data.mixing.lanes={lanes} is more than the {rows} rows of an optimizer step: lower it, or raise "
            "data.packing.rows or stage.accumulate"
        )
    shares = [(lane + 1) * rows // lanes - lane * rows // lanes for lane in range(lanes)]
    classes = math.gcd(lanes, world_size)
    if any(sum(shares[number::classes]) * classes != rows for number in range(classes)):
        raise UserError(
            f"data.mixing.lanes={lanes}: the {rows} rows of an optimizer step do not divide among them so that "
            f"{world_size} ranks get equally many: choose data.packing.rows * stage.accumulate as a multiple of it"
        )
    return shares


def check_lanes(state: Mapping[str, Any], lanes: int) -> None:
    """Raises: UserError: the position `state` of a planner is one of other lanes."""
    if "lane_count" not in state:
        raise UserError(
            "ckpt_path: the checkpoint's data position was written by an older version, which this one cannot go "
            "on from: start a new run from the weights (stage.init_from)"
        )
    if state["lane_count"] != lanes:
        raise UserError(
            f"data.mixing.lanes={lanes}: the checkpoint was made with {state['lane_count']}, which a run "
            "keeps: leave it null"
        )


@dataclass
class MicroPlan:
    """One micro-batch of this rank: `rows` to decode and collate, the `index`-th of window `window`."""

    window: int
    index: int
    rows: list[Row]


class Lane:
    """A mixture and its packer: rows of every window, independently of other lanes.

    Its state is that of the mixture and the samples that were drawn but not placed yet.
    """

    def __init__(self, mixture: Mixture, config: PackingConfig) -> None:
        self.mixture = mixture
        self.config = config
        self.pending: list[Sample] = []
        self._in_vain: Counter[str] = Counter()
        """Draws of each modality that gave none of it since one did."""
        self._met: set[str] = set()
        """Modalities that draws have given."""
        self.windows = 0
        self.without: Counter[str] = Counter()
        """Windows of this process that lack a modality, although the mixture has it."""
        self._placed: Counter[str] = Counter()
        """Samples of each modality in these windows."""
        self._told = False

    def plan(self, rows: int, modalities: Sequence[str] = MODALITIES) -> list[Row]:
        """The next `rows` rows, empty ones when the mixture has ended.

        Args:
            modalities: those that the rows hold in any case, as long as the mixture has them.
        """
        config = self.config
        capacity = rows * config.row_length
        pool = list(self.pending)
        drawn_in_vain = 0
        missing = capacity * (1 + config.look_ahead) - sum(sample.length for sample in pool)
        while missing > 0 and not self.mixture.exhausted:
            before = len(pool)
            drawn_in_vain = self._draw(pool, None, drawn_in_vain)
            missing -= sum(sample.length for sample in pool[before:])
        # A small window could lack a modality with a small share: ask for it by name. What is drawn on the way has to
        # wait, and more would wait with every window if there was no bound.
        musts = []
        waiting = sum(sample.length for sample in pool)
        for modality in modalities:
            found = [sample for sample in pool if _modality(sample) == modality]
            while not found and waiting < MAX_WAITING * capacity and modality in self.mixture.modalities:
                before = len(pool)
                self._in_vain[modality] = self._draw(pool, modality, self._in_vain[modality])
                waiting += sum(sample.length for sample in pool[before:])
                found = [sample for sample in pool[before:] if _modality(sample) == modality]
            self.without[modality] += not found and modality in self.mixture.modalities
            if found:
                # A single row has to hold both: there the shortest, else the one that has waited longest.
                musts.append(min(found, key=lambda sample: sample.length) if rows == 1 else found[0])
        if rows == 1 and sum(sample.length for sample in musts) > config.row_length:
            raise UserError(
                f"data.packing: one row of {config.row_length} positions cannot hold an image sample and a text "
                "sample, which every step needs: raise rows, row_length or stage.accumulate, or lower data.mixing.lanes"
            )
        # Then what waited longest, so that nothing waits for ever.
        self.windows += 1
        self._tell()
        others = [sample for sample in pool if not any(sample is must for must in musts)]
        packed, self.pending = fullest_rows(
            [*musts, *others],
            rows,
            config.row_length,
            config.images_per_row,
            first=len(musts) if rows == 1 and musts else 1,
        )
        self._placed.update(_modality(sample) for row in packed for sample in row)
        return packed + [[] for _ in range(rows - len(packed))]

    def _draw(self, pool: list[Sample], modality: str | None, in_vain: int) -> int:
        """Add a draw's samples to the pool; returns how many draws in a row gave none (of `modality`)."""
        for sample in self.mixture.draw(modality):
            if sample.length > self.config.row_length:
                self.mixture.streams[sample.source].leave_out(
                    sample, BadSample("longer_than_row", f"{sample.branches[0].key}: {sample.length} tokens")
                )
            else:
                pool.append(sample)
                self._met.add(_modality(sample))
                in_vain = -1 if modality in (None, _modality(sample)) else in_vain
        if in_vain >= DRAWS_IN_VAIN and modality not in self._met:
            what = f"{modality} sample (is data.sources.*.modality right?)" if modality else "usable sample"
            raise UserError(
                f"data: {DRAWS_IN_VAIN} draws in a row gave no {what}; so far: {self.mixture.counts}: "
                "check the sources' files and filters, or raise data.packing.row_length"
            )
        return in_vain + 1

    def _tell(self) -> None:
        """Warn once where what is trained on is not what the configuration says."""
        if self._told or self.windows < _WINDOWS_TO_TELL:
            return
        self._told = True
        for modality, count in self.without.items():
            if count:
                log.warning(
                    "data: %d of the first %d steps have no %s sample (%.1f %% of all samples are): to have one in "
                    "each, raise data.packing.rows for larger steps, or the weight of sources that have more of them",
                    count,
                    self.windows,
                    modality,
                    100 * self._placed[modality] / max(self._placed.total(), 1),
                )
        mixture = self.mixture
        total = sum(mixture.drawn.values())
        if any(stream.config.epochs is not None for stream in mixture.streams.values()) or not total:
            return  # shares change where sources end
        real = {name: count / total for name, count in mixture.drawn.items()}
        if odd := [name for name, share in mixture.shares.items() if abs(real[name] - share) > max(0.02, 0.2 * share)]:
            log.warning(
                "data: shares so far differ from the configured ones, since every step holds images and text: %s; "
                "raise data.packing.rows for larger steps, or change the weights",
                ", ".join(f"{name} {real[name]:.1%} instead of {mixture.shares[name]:.1%}" for name in odd),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"mixture": self.mixture.state_dict(), "pending": list(self.pending), "met": sorted(self._met)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state["mixture"])
        self.pending = []
        for sample in state["pending"]:
            if sample.length > self.config.row_length:  # rows were longer when it was drawn
                self.mixture.streams[sample.source].leave_out(
                    sample, BadSample("longer_than_row", f"{sample.branches[0].key}: {sample.length} tokens")
                )
            else:
                self.pending.append(sample)
        self._met = set(state.get("met", ()))


class Planner:
    """An endless iterator of this rank's micro-batches: the sampler of the training loader.

    A window's rows come from all lanes alike, so they do not depend on the number of ranks. Ranks and lanes are put
    in gcd(lanes, ranks) classes; the ranks of a class plan all of its lanes and share their rows. With as many lanes as
    ranks each rank plans its own; with one lane all ranks plan the same and take their part.

    Loaders run ahead of training, so the state after every planned window is kept until `consumed` says that the window
    has been trained on.

    Args:
        lane: makes the lane of a number.
    """

    def __init__(
        self,
        lane: Callable[[int], Lane],
        lanes: int,
        config: PackingConfig,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config = config
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        classes = math.gcd(lanes, world_size)
        self.ranks_of_class = world_size // classes
        self.first_of_class = rank < classes
        """Whether it is the one that speaks for its lanes where counters are summed."""
        self._bins = accumulate * (world_size // classes)
        self._first_bin = accumulate * (rank // classes)
        self._rows = rows_of_lanes(config.rows * accumulate * world_size, lanes, world_size)
        self.lane_count = lanes
        self.lanes = {number: lane(number) for number in range(rank % classes, lanes, classes)}
        self.number = 0
        """Windows planned so far."""
        self._lock = threading.Lock()
        self._states: dict[int, dict[int, dict[str, Any]]] = {0: self._snapshot()}

    @property
    def mixture(self) -> Mixture:
        """That of this rank's first lane; all have the same sources."""
        return next(iter(self.lanes.values())).mixture

    @property
    def finite(self) -> bool:
        return self.mixture.finite

    def __iter__(self) -> Iterator[MicroPlan]:
        while micro_batches := self.plan():
            yield from micro_batches

    def plan(self) -> list[MicroPlan]:
        """This rank's micro-batches of the next window; none when all its lanes have come to their end."""
        rows = [
            row for number, lane in self.lanes.items() for row in lane.plan(self._rows[number], self._musts(number))
        ]
        snapshot = self._snapshot()
        if not any(rows):
            with self._lock:
                self._states[self.number] = snapshot  # what was drawn in vain since the last window counts too
            return []
        mine = deal(rows, self._bins)[self._first_bin : self._first_bin + self.accumulate]
        with self._lock:
            self.number += 1
            self._states[self.number] = snapshot
        return [MicroPlan(self.number, index, rows) for index, rows in enumerate(mine)]

    def _musts(self, lane: int) -> list[str]:
        """The modalities that a lane sees to in the next window. Lanes take turns: if each had to place a text in every
        window, a window of few rows a lane would be more text than the mixture wants. Where sources end, they do so in
        different windows on different lanes, and each sees to what it still has."""
        if any(stream.config.epochs is not None for stream in self.mixture.streams.values()):
            return list(MODALITIES)
        return [m for i, m in enumerate(MODALITIES) if (self.number + i) % self.lane_count == lane]

    def _snapshot(self) -> dict[int, dict[str, Any]]:
        return {number: lane.state_dict() for number, lane in self.lanes.items()}

    def consumed(self, number: int) -> None:
        """Window `number` has been trained on: earlier states are not needed any more."""
        with self._lock:
            for old in [n for n in self._states if n < number]:
                del self._states[old]

    @property
    def number_consumed(self) -> int:
        with self._lock:
            return min(self._states)

    def _streams(self, number: int | None) -> list[tuple[str, dict[str, Any]]]:
        """Name and state of each stream of this rank's lanes after a window (None: the last consumed)."""
        with self._lock:
            lanes = self._states[min(self._states) if number is None else number]
        return [item for lane in lanes.values() for item in lane["mixture"]["streams"].items()]

    def counts(self, number: int | None = None) -> Counter[str]:
        """`source/seen`, `skipped/source/reason`, ... of this rank's lanes up to a window (the last consumed).

        `source/samples`, tokens, targets and images are those in the windows; `source/waiting` samples are drawn and
        come in later ones.
        """
        total = self.drawn(number)
        with self._lock:
            lanes = self._states[min(self._states) if number is None else number]
            pending = [sample for lane in lanes.values() for sample in lane["pending"]]
        for sample in pending:
            numbers = {"samples": len(sample.branches), "tokens": sample.length}
            numbers |= {"targets": sample.targets, "images": len(sample.images)}
            total.subtract({f"{sample.source}/{key}": value for key, value in numbers.items()})
            total[f"{sample.source}/waiting"] += len(sample.branches)
        return total

    def drawn(self, number: int | None = None) -> Counter[str]:
        """As `counts`, of what was drawn, whether it is in the windows yet or not."""
        total: Counter[str] = Counter()
        for name, stream in self._streams(number):
            total.update({counter_of(name, key): value for key, value in stream["counts"].items()})
            total.update({counter_of(name, f"skipped/{key}"): value for key, value in stream["left_out"].items()})
        return total

    def left_out(self, number: int | None = None) -> tuple[Counter[str], int]:
        """Of `counts` those that are about what could not even be indexed, and how many records were."""
        streams = self._streams(number)
        total: Counter[str] = Counter()
        for name, stream in streams:
            total.update({counter_of(name, f"skipped/{key}"): value for key, value in stream["left_out"].items()})
        return total, sum(stream["indexed"] for _, stream in streams)

    def example(self, counter: str) -> str:
        """The first that this process met of `skipped/source/reason`, in words; "" where it met none."""
        name, key = split_counter(counter)
        streams = [lane.mixture.streams[name] for lane in self.lanes.values() if name in lane.mixture.streams]
        return next((stream.examples[key][0] for stream in streams if stream.examples.get(key)), "")

    def files(self, number: int | None = None) -> tuple[int, int]:
        """How many files this rank's lanes have opened, and how many of these were lost."""
        files = [stream["files"] for _, stream in self._streams(number)]
        return sum(of.get("opened", 0) for of in files), sum(of.get("lost", 0) for of in files)

    def rewind(self, number: int) -> None:
        """Forget what was planned after window `number`, to plan it again."""
        if number < self.number:
            for lane, state in self._states[number].items():
                self.lanes[lane].load_state_dict(state)
            self.number = number
            self._states = {old: state for old, state in self._states.items() if old <= number}

    def state_dict(self) -> dict[str, Any]:
        """Where to go on after the last consumed window; only lists, dicts, strings and numbers.

        Of this rank's lanes: the states of all ranks are merged by `merge_states`.
        """
        with self._lock:
            number = min(self._states)
            states = self._states[number]
        lanes = {
            str(lane): state | {"pending": [_to_plain(sample) for sample in state["pending"]]}
            for lane, state in states.items()
        }
        return {"number": number, "lane_count": self.lane_count, "rows": sum(self._rows), "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the merged states of all ranks, however many there were."""
        check_lanes(state, self.lane_count)
        if (rows := state.get("rows")) != sum(self._rows):
            log.warning(
                "an optimizer step has %d rows now, in the checkpoint it had %s: stage.rows_per_step=%s keeps it, on "
                "any number of ranks",
                sum(self._rows),
                rows,
                rows,
            )
        self.number = state["number"]
        for number, lane in self.lanes.items():
            plain = state["lanes"][str(number)]
            lane.load_state_dict(plain | {"pending": [_from_plain(sample) for sample in plain["pending"]]})
        self._states = {self.number: self._snapshot()}


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The planner states of all ranks as one."""
    number = max(state["number"] for state in states)  # ranks come to the end of a finite mixture one by one
    return states[0] | {
        "number": number,
        "lanes": {lane: value for state in states for lane, value in state["lanes"].items()},
    }


def _modality(sample: Sample) -> str:
    return "image" if sample.images else "text"


def _to_plain(sample: Sample) -> dict[str, Any]:
    return {
        "prefix": list(sample.prefix),
        "branches": [[list(b.ids), list(b.supervised), b.task, b.key] for b in sample.branches],
        "images": [
            [image.path, image.offset, image.size, list(image.crop or ()), image.flip, list(image.annotated or ())]
            for image in sample.images
        ],
        "source": sample.source,
        "seen": [list(views) for views in sample.seen],
    }


def _from_plain(plain: dict[str, Any]) -> Sample:
    return Sample(
        plain["prefix"],
        [Branch(*branch) for branch in plain["branches"]],
        tuple(
            # Older checkpoints do not have the annotated size.
            ImageRef(path, offset, size, tuple(crop) or None, flip, *(tuple(pair) or None for pair in annotated))
            for path, offset, size, crop, flip, *annotated in plain["images"]
        ),
        plain["source"],
        tuple(tuple(views) for views in plain["seen"]),
    )


@dataclass
class Collator:
    """A planned micro-batch -> `Batch`: decodes images, masks the slots of those that cannot be read.

    Args:
        row_length: T. image_size: S, pixels a side.
        sources: names of all sources, to say of every target where it comes from; none: it is not said.
    """

    row_length: int
    image_size: int
    weighting: str = "token"
    sources: list[str] = field(default_factory=list)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        # Filled in numpy: torch takes several times as long for pieces as short as a question.
        b, t, size = len(rows), self.row_length, self.image_size
        ids = np.zeros((b, t), np.int64)
        labels = np.full((b, t), IGNORE, np.int64)
        weights = np.zeros((b, t), np.float32)
        segments = np.zeros((b, t), np.int32)
        branches = np.zeros((b, t), np.int32)
        positions = np.zeros((b, t), np.int64)
        tasks = np.zeros((b, t), np.int32)
        sources = np.zeros((b, t), np.int32)
        pixels = torch.empty(sum(len(s.images) for row in rows for s in row), 3, size, size, dtype=torch.uint8)
        slots: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        seen: list[tuple[bool, ...]] = []
        keys: list[str] = []
        counters: Counter[str] = Counter()
        examples: dict[str, str] = {}
        weigh = WEIGHTINGS[self.weighting]
        ascending = np.arange(t)
        decoded = 0

        for row, samples in enumerate(rows):
            at = 0
            for segment, sample in enumerate(samples, start=1):
                readable = self._decode(sample, counters, pixels[decoded:], examples)
                decoded += len(sample.images)
                seen += sample.seen
                counters["samples"] += len(sample.branches)
                counters["images"] += len(sample.images)
                counters["pairs"] += sample.pairs
                counters[f"modality/{_modality(sample)}"] += int(readable)
                begin, end = at, at + sample.length
                flat = list(sample.prefix)
                for branch in sample.branches:
                    flat += branch.ids
                tokens = np.array(flat, np.int64)
                ids[row, begin:end] = np.maximum(tokens, 0)
                slots.append(row * t + begin + np.flatnonzero(tokens == IMAGE_SLOT))
                segments[row, begin:end] = segment
                if self.sources:
                    sources[row, begin:end] = self.sources.index(sample.source)
                prefix = len(sample.prefix)
                positions[row, at : at + prefix] = ascending[:prefix]
                at += prefix
                for number, branch in enumerate(sample.branches, start=1):
                    n = len(branch.ids)
                    positions[row, at : at + n] = ascending[prefix : prefix + n]
                    branches[row, at : at + n] = number
                    keys.append(f"{sample.source}/{branch.key}")
                    targets = branch.supervised.count(True)
                    if readable and targets:
                        places = at + np.flatnonzero(np.frombuffer(bytes(branch.supervised), np.bool_)[1:])
                        labels[row, places] = tokens[places - begin + 1]
                        weights[row, places] = weigh(targets)
                        tasks[row, at : at + n] = TASK_NAMES.index(branch.task)
                    at += n

        counters["tokens"] = int((segments > 0).sum())
        counters["positions"] = b * t
        if seen:
            counters["views"] = sum(map(sum, seen))
        counters["targets"] = int((labels != IGNORE).sum())
        return Batch(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            segment_ids=torch.from_numpy(segments),
            branch_ids=torch.from_numpy(branches),
            position_ids=torch.from_numpy(positions),
            task_ids=torch.from_numpy(tasks),
            pixels=pixels,
            image_slots=torch.from_numpy(np.concatenate(slots)),
            seen_views=torch.tensor(seen) if seen else None,
            source_ids=torch.from_numpy(sources) if self.sources else None,
            tasks=TASK_NAMES,
            sources=self.sources,
            keys=keys,
            counters={key: float(value) for key, value in counters.items()},
            examples=examples,
        )

    def _decode(self, sample: Sample, counters: Counter[str], pixels: torch.Tensor, examples: dict[str, str]) -> bool:
        """Write the sample's images to the first of `pixels`, black where one cannot be read; whether all could."""
        readable = True
        for number, ref in enumerate(sample.images):
            try:
                pixels[number] = load_image(ref, self.image_size)
            except BadSample as error:
                readable = False
                counters[counter := counter_of(sample.source, error.counter)] += len(sample.branches)
                examples.setdefault(counter, error.detail)
                pixels[number] = 0
        return readable
