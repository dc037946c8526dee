"""The plan of a run's data: which rows each rank gets in each optimizer step, before any image is
decoded.

A *global batch* is what one optimizer step consumes: the rows of all ranks and micro-batches. It is
planned as a whole, so that it holds both text and images. Each partition
(`sphinx_pl.data.sampling.partition`) plans its own rows of it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sphinx_pl.data.sampling.config import MODALITIES
from sphinx_pl.data.sampling.mixture import Mixture
from sphinx_pl.data.sampling.packing import PackingConfig, Row, deal
from sphinx_pl.data.sampling.partition import Partition
from sphinx_pl.data.sampling.resume_state import sample_from_plain, sample_to_plain
from sphinx_pl.data.skip import counter_of, split_counter
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)


def rows_of_partitions(rows: int, partitions: int, world_size: int) -> list[int]:
    """The number of rows of a global batch that each partition plans, so that all ranks get equally
    many.

    Raises:
        UserError: the rows do not divide so.
    """
    if rows < partitions:
        raise UserError(
            f"data.mixing.partitions={partitions} is more than the {rows} rows of an optimizer step: lower it, or "
            "raise data.packing.micro_batch_rows or stage.accumulate"
        )
    shares = [(number + 1) * rows // partitions - number * rows // partitions for number in range(partitions)]
    classes = math.gcd(partitions, world_size)
    if any(sum(shares[number::classes]) * classes != rows for number in range(classes)):
        raise UserError(
            f"data.mixing.partitions={partitions}: the {rows} rows of an optimizer step do not divide among them so "
            f"that {world_size} ranks get equally many: choose data.packing.micro_batch_rows * stage.accumulate as a "
            "multiple of it"
        )
    return shares


def check_partitions(state: Mapping[str, Any], partitions: int) -> None:
    """Raises: UserError: the position `state` of a planner belongs to another number of partitions."""
    if "partition_count" not in state:
        raise UserError(
            "ckpt_path: the checkpoint's data position was written by a version that this one cannot resume from: "
            "start a new run from the weights (stage.init_from)"
        )
    if state["partition_count"] != partitions:
        raise UserError(
            f"data.mixing.partitions={partitions}: the checkpoint was made with {state['partition_count']}, which a "
            "run keeps: leave it null"
        )


@dataclass
class MicroPlan:
    """The rows of one micro-batch of this rank, the `index`-th of step `step`."""

    step: int
    index: int
    rows: list[Row]


class Planner:
    """An endless iterator over this rank's micro-batches: the sampler of the training loader.

    The rows of a global batch come from all partitions alike, so they do not depend on the number
    of ranks. Ranks and partitions are put in gcd(partitions, ranks) classes. The ranks of a class
    plan all of its partitions and share their rows. With as many partitions as ranks, each rank
    plans its own. With one partition, all ranks plan the same rows and take their part.

    Loaders run ahead of training. So the state after every planned step is kept until `consumed`
    says that the step has been trained on.

    Args:
        partition: makes the partition of a number.
    """

    def __init__(
        self,
        partition: Callable[[int], Partition],
        partitions: int,
        config: PackingConfig,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config = config
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        classes = math.gcd(partitions, world_size)
        self.ranks_of_class = world_size // classes
        self.first_of_class = rank < classes
        """Whether this rank reports the counters of its partitions in sums over ranks."""
        self._bins = accumulate * (world_size // classes)
        self._first_bin = accumulate * (rank // classes)
        self._rows = rows_of_partitions(config.micro_batch_rows * accumulate * world_size, partitions, world_size)
        self.partition_count = partitions
        self.partitions = {number: partition(number) for number in range(rank % classes, partitions, classes)}
        self.number = 0
        """The number of steps planned so far."""
        self._lock = threading.Lock()
        self._states: dict[int, dict[int, dict[str, Any]]] = {0: self._snapshot()}

    @property
    def mixture(self) -> Mixture:
        """The mixture of this rank's first partition; all partitions have the same sources."""
        return next(iter(self.partitions.values())).mixture

    @property
    def finite(self) -> bool:
        return self.mixture.finite

    def __iter__(self) -> Iterator[MicroPlan]:
        while micro_batches := self.plan():
            yield from micro_batches

    def plan(self) -> list[MicroPlan]:
        """This rank's micro-batches of the next step; none when all its partitions have ended."""
        rows = [
            row
            for number, partition in self.partitions.items()
            for row in partition.plan(self._rows[number], self._musts(number))
        ]
        snapshot = self._snapshot()
        if not any(rows):
            with self._lock:
                self._states[self.number] = snapshot  # draws in vain since the last step count too
            return []
        mine = deal(rows, self._bins)[self._first_bin : self._first_bin + self.accumulate]
        with self._lock:
            self.number += 1
            self._states[self.number] = snapshot
        return [MicroPlan(self.number, index, rows) for index, rows in enumerate(mine)]

    def _musts(self, number: int) -> list[str]:
        """The modalities that a partition must place in the next step.

        Partitions take turns. If each had to place a text in every step, a step of few rows a
        partition would hold more text than the mixture wants. Where sources end, they end in
        different steps on different partitions. Then every partition places what it still has.
        """
        if any(stream.config.epochs is not None for stream in self.mixture.streams.values()):
            return list(MODALITIES)
        return [m for i, m in enumerate(MODALITIES) if (self.number + i) % self.partition_count == number]

    def _snapshot(self) -> dict[int, dict[str, Any]]:
        return {number: partition.state_dict() for number, partition in self.partitions.items()}

    def consumed(self, number: int) -> None:
        """Note that step `number` has been trained on: earlier states are not needed any more."""
        with self._lock:
            for old in [n for n in self._states if n < number]:
                del self._states[old]

    @property
    def number_consumed(self) -> int:
        with self._lock:
            return min(self._states)

    def _streams(self, number: int | None) -> list[tuple[str, dict[str, Any]]]:
        """Name and state of each stream of this rank after a step (None: the last consumed)."""
        with self._lock:
            partitions = self._states[min(self._states) if number is None else number]
        return [item for partition in partitions.values() for item in partition["mixture"]["streams"].items()]

    def counts(self, number: int | None = None) -> Counter[str]:
        """`source/seen`, `skipped/source/reason`, ... of this rank's partitions up to a step (None:
        the last consumed).

        `source/samples`, tokens, targets and images count what the steps hold. `source/waiting`
        counts samples that are drawn and come in later steps.
        """
        total = self.drawn(number)
        with self._lock:
            partitions = self._states[min(self._states) if number is None else number]
            pending = [sample for partition in partitions.values() for sample in partition["pending"]]
        for sample in pending:
            numbers = {"samples": len(sample.questions), "tokens": sample.length}
            numbers |= {"targets": sample.targets, "images": len(sample.images)}
            total.subtract({f"{sample.source}/{key}": value for key, value in numbers.items()})
            total[f"{sample.source}/waiting"] += len(sample.questions)
        return total

    def drawn(self, number: int | None = None) -> Counter[str]:
        """The counters of all that was drawn, whether a step holds it yet or not; see `counts`."""
        total: Counter[str] = Counter()
        for name, stream in self._streams(number):
            total.update({counter_of(name, key): value for key, value in stream["counts"].items()})
            total.update({counter_of(name, f"skipped/{key}"): value for key, value in stream["left_out"].items()})
        return total

    def left_out(self, number: int | None = None) -> tuple[Counter[str], Counter[str]]:
        """The `counts` of what could not even be indexed, and the number of indexed records of each
        source."""
        total: Counter[str] = Counter()
        indexed: Counter[str] = Counter()
        for name, stream in self._streams(number):
            total.update({counter_of(name, f"skipped/{key}"): value for key, value in stream["left_out"].items()})
            indexed[name] += stream["indexed"]
        return total, indexed

    def example(self, counter: str) -> str:
        """The first thing that this process counted under `skipped/source/reason`, in words; "" if
        there is none."""
        name, key = split_counter(counter)
        streams = [p.mixture.streams[name] for p in self.partitions.values() if name in p.mixture.streams]
        return next((stream.examples[key][0] for stream in streams if stream.examples.get(key)), "")

    def files(self, number: int | None = None) -> tuple[int, int]:
        """The number of files that this rank's partitions opened, and of those that were lost."""
        files = [stream["files"] for _, stream in self._streams(number)]
        return sum(of.get("opened", 0) for of in files), sum(of.get("lost", 0) for of in files)

    def rewind(self, number: int) -> None:
        """Forget what was planned after step `number`, to plan it again."""
        if number < self.number:
            for name, state in self._states[number].items():
                self.partitions[name].load_state_dict(state)
            self.number = number
            self._states = {old: state for old, state in self._states.items() if old <= number}

    def state_dict(self) -> dict[str, Any]:
        """The position after the last consumed step: only lists, dicts, strings and numbers.

        It holds this rank's partitions; `merge_states` merges the states of all ranks.
        """
        with self._lock:
            number = min(self._states)
            states = self._states[number]
        partitions = {
            str(name): state | {"pending": [sample_to_plain(sample) for sample in state["pending"]]}
            for name, state in states.items()
        }
        return {
            "number": number,
            "partition_count": self.partition_count,
            "rows": sum(self._rows),
            "partitions": partitions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the merged states of all ranks, however many there were."""
        check_partitions(state, self.partition_count)
        if (rows := state.get("rows")) != sum(self._rows):
            log.warning(
                "an optimizer step has %d rows now, in the checkpoint it had %s: stage.global_batch_rows=%s keeps it, "
                "on any number of ranks",
                sum(self._rows),
                rows,
                rows,
            )
        self.number = state["number"]
        for number, partition in self.partitions.items():
            plain = state["partitions"][str(number)]
            partition.load_state_dict(plain | {"pending": [sample_from_plain(sample) for sample in plain["pending"]]})
        self._states = {self.number: self._snapshot()}
