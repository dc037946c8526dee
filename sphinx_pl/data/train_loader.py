"""The training loader: it plans ahead, decodes images in workers and counts what is skipped."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import queue
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.sampling.config import MODALITIES
from sphinx_pl.data.sampling.packing import Row
from sphinx_pl.data.sampling.planner import MicroPlan, Planner
from sphinx_pl.data.sampling.stream import MADE
from sphinx_pl.data.schema import Batch
from sphinx_pl.data.skip import split_counter
from sphinx_pl.runtime import signals
from sphinx_pl.runtime.collectives import any_rank
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)

_EXPECTED = ("waiting", "unused/tasks", "unused/where", "unused/ratio")
"""Counters of what a later step trains on, and of what the configuration does not ask for."""


_ENOUGH = 200
"""Records from which on a share is taken as it is."""
_FEW = 20
_NEARLY_ALL = 0.9
"""A source of which more than this share is skipped is wrong, once `_FEW` records were drawn."""


def _margin(records: int) -> float:
    """How far the share among `records` records may exceed its limit by chance.

    By Hoeffding's inequality, a share at the limit exceeds it by more once in a million times.
    """
    return 0.0 if records >= _ENOUGH else math.sqrt(math.log(1e6) / (2 * max(records, 1)))


def _by_source(counts: Counter[str]) -> defaultdict[str, Counter[str]]:
    """Source -> its counters."""
    groups: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, count in counts.items():
        groups[split_counter(name)[0]][name] = count
    return groups


def _share(skipped: Counter[str], left_out: Counter[str], indexed: int, records: int) -> float:
    """The share that cannot be used.

    What could not be indexed is a share of all that was opened, and only `records` of that were
    drawn.

    Args:
        skipped: all that was skipped, with `left_out`.
        left_out: what could not be indexed, beside the `indexed` records.
    """
    lost = left_out.total() / max(left_out.total() + indexed, 1)
    return lost + (1 - lost) * (skipped.total() - left_out.total()) / max(records, 1)


class _PlannedBatches(Dataset[Batch]):
    """Maps plans to decoded micro-batches: this runs in the data workers."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getitem__(self, plan: MicroPlan) -> Batch:
        batch = self.collator(plan.rows)
        batch.step = plan.step
        return batch


class _Ahead:
    """An iterator over a planner that runs `depth` plans ahead, in a thread of its own.

    So reading annotations never waits for the training loop, and the loop never waits for them.
    """

    def __init__(self, planner: Planner, depth: int) -> None:
        self.planner = planner
        self.depth = depth
        self.stop: Callable[[], None] = lambda: None
        """Ends the thread. Otherwise it ends only when the iterator is given up."""

    def __iter__(self) -> Iterator[MicroPlan]:
        plans: queue.Queue[MicroPlan | BaseException | None] = queue.Queue(self.depth)
        stopped = threading.Event()

        def put(item: MicroPlan | BaseException | None) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    return plans.put(item, timeout=0.1)

        def run() -> None:
            try:
                for plan in self.planner:
                    put(plan)
                    if stopped.is_set():
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=run, name="plan-steps", daemon=True)
        thread.start()

        def stop() -> None:
            stopped.set()
            thread.join()

        self.stop = stop
        try:
            while (item := plans.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop()


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signals.ignore()  # on a signal the run takes one more step and saves, so its workers must run on


def as_is(batch: Any) -> Any:
    """The batch itself: the `collate_fn` of loaders whose data set gives whole batches."""
    return batch


class TrainLoader:
    """Micro-batches; they are endless unless every source has `epochs`.

    The loader counts what was skipped and stops the run when that is too much. A global batch that
    lost all its images to unreadable files, or all its text, is skipped and counted, since every
    step must hold both. With several ranks it is trained on as it is and counted, because other
    ranks' images are part of the step.

    Args:
        max_skipped: share of samples above which skipping them stops the run.
        at_end: called when a finite mixture has ended.
    """

    def __init__(
        self,
        planner: Planner,
        collator: Collator,
        workers: int,
        max_skipped: float,
        pin_memory: bool,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.planner = planner
        self.at_end = at_end
        self.asked: Callable[[], None] = lambda: None
        """Called when the next micro-batch is asked for; the caller may have to wait for it."""
        self.collator = collator
        self.max_skipped = max_skipped
        self.counts: Counter[str] = Counter()
        """Counters of this rank since it was started."""
        self.before: Counter[str] = Counter()
        """Counters of all ranks before the run was resumed; on the first rank alone."""
        self._start: Counter[str] = Counter()
        self._indexed_before: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        self._examples: dict[str, str] = {}  # from decoding
        self._told: set[str] = set()
        self._reached: int | None = None  # the last step whose micro-batches were handed out
        self._current: weakref.ref[Generator[Batch]] | None = None
        self._ahead = _Ahead(planner, 2 * workers * planner.accumulate) if workers else None
        self._loader = DataLoader(
            _PlannedBatches(collator),
            sampler=self._ahead or planner,
            batch_size=None,
            num_workers=workers,
            collate_fn=as_is,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            prefetch_factor=max(2, planner.accumulate // workers) if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        """An iterator that continues after the last step; an earlier iterator ends."""
        if self._current is not None and (before := self._current()) is not None:
            before.close()
        if self._reached is not None:
            self.planner.rewind(self._reached)
        iterator = self._batches()
        self._current = weakref.ref(iterator)
        return iterator

    def _batches(self) -> Generator[Batch]:
        self._start = self.planner.drawn()
        self._indexed_before = left_out, indexed = self.planner.left_out()
        total = indexed.total() + left_out.total()
        self._refuse(left_out, left_out.total() / max(total, 1), total)
        for micro_batches in self._steps():
            for batch in micro_batches:
                for counter, example in batch.examples.items():
                    self._examples.setdefault(counter, example)
                self.counts.update(
                    {k: int(v) for k, v in batch.counters.items() if k.startswith(("skipped/", "samples"))}
                )
            self._reached = micro_batches[0].step
            self._check_skipped(self._reached)
            missing = [
                modality
                for modality in MODALITIES
                if any(f"modality/{modality}" in batch.counters for batch in micro_batches)
                and not any(batch.counters.get(f"modality/{modality}") for batch in micro_batches)
            ]
            if missing:
                self.counts[f"skipped/steps/without_{missing[0]}"] += 1
                if self.planner.world_size == 1 and not self.planner.finite:
                    continue
            for batch in micro_batches:
                yield batch
                self.asked()

    def _steps(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step; each knows the weight of them all."""
        batches = iter(self._loader)
        try:
            yield from self._weighed(batches)
        finally:
            # The workers end now, and not when the traceback that holds them is gone.
            if self._ahead is not None:
                self._ahead.stop()
                batches._shutdown_workers()  # type: ignore[attr-defined]  # there is no public way

    def _weighed(self, batches: Iterator[Batch]) -> Iterator[list[Batch]]:
        number = self.planner.number_consumed
        while True:
            micro_batches = list(itertools.islice(batches, self.planner.accumulate))
            # Ranks reach the end of a finite mixture in different steps. Those that have ended
            # continue with empty rows.
            if self.planner.finite and not any_rank(bool(micro_batches), self.planner.world_size):
                self.at_end()
                return
            if not micro_batches:
                empty: list[Row] = [[] for _ in range(self.planner.config.micro_batch_rows)]
                micro_batches = [self.collator(empty) for _ in range(self.planner.accumulate)]
                for batch in micro_batches:
                    batch.step = number
            number = micro_batches[0].step
            weight = sum(float(batch.weights.sum()) for batch in micro_batches)
            for i, batch in enumerate(micro_batches):
                batch.step_weight = weight
                batch.ends_step = i == len(micro_batches) - 1
            yield micro_batches

    def _check_skipped(self, step: int) -> None:
        self._check_files(step)
        # Counted since this start. The planned numbers are those of the partitions that this rank
        # plans; it decodes a part of their rows.
        planned = self.planner.drawn(step) - self._start
        decoded = {k: v * self.planner.ranks_of_class for k, v in self.counts.items()}
        skipped = Counter[str]()
        for counts in (planned, decoded):  # both may have the same counter
            skipped.update({key: count for key, count in counts.items() if key.startswith("skipped/")})
        self._warn(skipped)
        left_out, indexed = self.planner.left_out(step)
        left_out, indexed = left_out - self._indexed_before[0], indexed - self._indexed_before[1]
        # A small source may be bad as a whole without much weight in the mixture.
        lost_of_source = _by_source(left_out)
        for name, own in _by_source(skipped).items():
            records = planned[f"{name}/seen"]
            share = _share(own, lost_of_source[name], indexed[name], records)
            if records >= _FEW and share > max(_NEARLY_ALL, self.max_skipped):
                self._refuse(own, share, records)
        records = sum(v for k, v in planned.items() if k.endswith("/seen"))
        share = _share(skipped, left_out, indexed.total(), records)
        if share > self.max_skipped + _margin(records):
            self._refuse(skipped, share, records)

    def _warn(self, skipped: Mapping[str, int]) -> None:
        """Warn of the first sample that each counter counts; the others are only counted."""
        for counter in skipped.keys() - self._told:
            self._told.add(counter)
            if example := self.example(counter):
                log.warning("data: %s, such as %s; the others are counted", counter, example)

    def example(self, counter: str) -> str:
        """The first thing that this process counted under a counter of what is skipped, in words;
        "" if none."""
        return self._examples.get(counter) or self.planner.example(counter)

    def _check_files(self, step: int) -> None:
        """Raises: UserError: too many files are lost. A lost file counts once, however many records
        it had."""
        opened, lost = self.planner.files(step)
        if opened >= 10 and lost > self.max_skipped * opened:
            raise UserError(
                f"data: {lost} of the first {opened} files could not be read, more than "
                f"data.max_skipped={self.max_skipped:.1%}: the log says why of each; repair them or raise the limit"
            )

    def _refuse(self, skipped: Mapping[str, int], share: float, records: int) -> None:
        """Raises: UserError: the share of `records` that was skipped is above `max_skipped`."""
        if share > self.max_skipped:
            worst = "; ".join(self._counted(k, v) for k, v in sorted(skipped.items(), key=lambda item: -item[1])[:5])
            raise UserError(
                f"data: {share:.1%} of {records} samples could not be used, more than "
                f"data.max_skipped={self.max_skipped:.1%} ({worst}): repair these sources or raise the limit"
            )

    def _counted(self, counter: str, count: int) -> str:
        example = self.example(counter)
        return f"{counter}: {count}{f', such as {example}' if example else ''}"

    def summary(self, counters: Mapping[str, int]) -> list[str]:
        """A line for each source with skipped or changed records, with numbers and examples.

        What `tasks`, `where` and `ratio` of a source do not ask for is not among them.
        """
        of_source: dict[str, list[str]] = defaultdict(list)
        for counter, count in sorted(counters.items()):
            source, what = split_counter(counter)
            if count and what and what not in (*MADE, *_EXPECTED):
                example = self.example(counter)
                of_source[source].append(f"{what}: {count}{f', such as {example}' if example else ''}")
        return [
            f"data: {source}, of {counters.get(f'{source}/seen', 0)} records: {'; '.join(counts)}"
            for source, counts in sorted(of_source.items())
        ]

    @property
    def counters(self) -> dict[str, int]:
        """This rank's part of the counters since the start of the run, to be summed over ranks.

        `source/seen`, `source/tokens`, `source/images`, ... count what was drawn.
        `skipped/source/reason` counts what was skipped then or when images were decoded.
        """
        own = self.planner.counts(self._reached) if self.planner.first_of_class else Counter()
        return dict(own + self.counts + self.before)

    @property
    def skipped(self) -> dict[str, int]:
        """The counters of what could not be used."""
        return {key: value for key, value in self.counters.items() if key.startswith("skipped/")}
