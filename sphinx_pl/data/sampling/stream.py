"""One partition's part of a source, in a new order every epoch, and the position that was reached
in it.

A canonical *partition* is an independent line of planning: it has its own part of every source and
its own packer. A run has a fixed number of partitions. So the order of the data does not depend on
the number of ranks or workers. Shards are dealt to the partitions. All partitions open a source
with few shards, and each takes every `partitions`-th record.

Shards are opened `shuffle_shards` at a time (a *block*), and the records of a block are shuffled
together. The order is a function of (seed, source, epoch, block), so the position is a few
integers.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from sphinx_pl.data.augment import AugmentConfig, augment_together
from sphinx_pl.data.files import fingerprint
from sphinx_pl.data.processor import Processor, merge_questions
from sphinx_pl.data.readers import Reader, Shard, config_key
from sphinx_pl.data.schema import Record, Sample
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError

if TYPE_CHECKING:
    from sphinx_pl.data.sampling.config import SourceConfig

_SHARDS_PER_PARTITION = 8
"""Shards are dealt if each partition gets at least this many. With fewer, the parts would differ
too much in size."""

EXAMPLES = 3
"""Examples of skipped records and of events that are kept for each reason."""
MADE = ("seen", "samples", "parts", "tokens", "targets", "images")
"""The counters of what was drawn and what became of it. Every other counter names what was left
out, or an event."""


@dataclass
class _OpenShard:
    """One shard of a block, None if it cannot be opened, with the counters of its skips."""

    shard: Shard | None
    skipped: Counter[str]
    unused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    fingerprint: str | None = None


_Opened = list[_OpenShard]


def _in_background(make: Callable[[], _Opened]) -> Future[_Opened]:
    """The future result of `make`, from a thread that the end of the process does not wait for.

    So the next block's shards are opened (an index, perhaps a download) while this block is read.
    """
    future: Future[_Opened] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="open-shards", daemon=True).start()
    return future


def check_place(state: Mapping[str, Any], name: str, seed: int, files: int) -> None:
    """Check that the position `state` of a source means the same records in this run.

    Args:
        files: how many the source has.

    Raises:
        UserError: it does not, so that a run which resumes there would repeat some records and skip
            others.
    """
    if state["shards"] != files:
        raise UserError(
            f"source '{name}': the checkpoint was made with {state['shards']} files, there are {files}: resume with "
            "the same ones, or start a new run from its weights (stage.init_from)"
        )
    if (before := state.get("seed", seed)) != seed:  # versions before did not write it down
        raise UserError(
            f"seed={seed}: the checkpoint was made with {before}, and the order of the records follows from it, so "
            f"some would be repeated and others skipped: set seed={before}, or start a new run from its weights "
            "(stage.init_from)"
        )


class SourceStream:
    """The samples of a source, for ever or for a number of epochs.

    Args:
        max_length: questions about one image are joined up to this number of tokens.
        partition, partitions: which part of the source this stream reads, and of how many.

    Raises:
        UserError: the source has nothing to read.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        source: Reader,
        processor: Processor,
        seed: int,
        max_length: int,
        augment: AugmentConfig | None = None,
        partition: int = 0,
        partitions: int = 1,
    ) -> None:
        self.augment = augment or AugmentConfig()
        self.name = name
        self.config = config
        self.source = source
        self.processor = processor
        self.seed = seed
        self.max_length = min(max_length, processor.max_length)
        for task, cap in config.caps.items():
            if 0 < cap < partitions:
                raise UserError(
                    f"data.sources.{name}.caps.{task}={cap} is less than data.mixing.partitions={partitions}: raise "
                    "it, or take only other tasks with `tasks`"
                )
        self.partition = partition
        self.partitions = partitions
        self.counts: Counter[str] = Counter()
        """seen, samples, parts, tokens, targets, images, skipped/<reason>, filtered/<reason>,
        capped/<task>.

        `parts` counts the parts of long documents beyond their first. So seen + parts = samples +
        skipped + filtered + capped. The samples' own events are counted too, and unused/<name>:
        what files hold beside records.
        """
        self.left_out: Counter[str] = Counter()
        """Reason -> count of what was unreadable when shards were opened."""
        self.examples: dict[str, list[str]] = {}
        """A counter's name -> the first few things that this process counted, in words."""
        self.files: Counter[str] = Counter()
        """opened counts files; lost counts those of them in which nothing could be read."""
        self.indexed = 0
        """Records of the shards that were opened; `left_out` is compared with it."""
        self.epoch = 0
        self.block = 0
        self.position = 0
        self.taken: Counter[str] = Counter()
        """Records of each capped task that this epoch has used."""
        self._shards: list[Shard | None] = []
        self._lengths: list[int] = []
        self._fingerprints: dict[str, str] = {}
        """Number of each local file of the block -> its fingerprint when it was opened."""
        self._units: Any = []  # lists of indices, or an [n, 1] array of them
        self._ahead: tuple[tuple[int, int], Future[_Opened]] | None = None
        self._any_record = False  # in any partition
        self._open()
        self._skip_empty()

    # --- the order

    @property
    def _one_block(self) -> bool:
        """Whether all shards are open together for the whole run."""
        count = len(self.source.urls)
        return count <= self.config.shuffle_shards and (self.partitions == 1 or not self._dealt)

    @property
    def _dealt(self) -> bool:
        return len(self.source.urls) >= _SHARDS_PER_PARTITION * self.partitions

    def _blocks(self, epoch: int) -> list[list[int]]:
        """The shard numbers of each of this partition's blocks in an epoch."""
        count, size = len(self.source.urls), self.config.shuffle_shards
        if self._one_block:
            return [list(range(count))]
        order = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), epoch, 1 << 20]).permutation(count)
        if self._dealt:
            order = order[self.partition :: self.partitions]
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]

    def _open(self, lengths: list[int] | None = None) -> None:
        """Open the current block and order its records.

        Args:
            lengths: of the block's shards when the block was started; None: they are those of now.
        """
        place = (self.epoch, self.block)
        if self._ahead is not None and self._ahead[0] == place:
            opened = self._ahead[1].result()
        else:
            opened = self._opened(self._blocks(self.epoch)[self.block])
        self._ahead = None
        numbers = self._blocks(self.epoch)[self.block]
        self._fingerprints = {
            str(n): one.fingerprint for n, one in zip(numbers, opened, strict=True) if one.fingerprint
        }
        if self._dealt or self.partition == 0:  # otherwise every partition would count it
            before = {id(shard) for shard in self._shards if shard is not None}
            for block in opened:
                if id(block.shard) not in before:
                    self.left_out.update(block.skipped)
                    self.counts.update({f"unused/{name}": count for name, count in block.unused.items()})
                    for counter, example in block.examples.items():
                        self._example(counter, example)
                    self.files["opened"] += 1
                    self.files["lost"] += not block.shard  # an empty shard is lost too
                    self.indexed += len(block.shard) if block.shard is not None else 0
        self._shards = [block.shard for block in opened]
        self._lengths = lengths or [len(shard) if shard is not None else 0 for shard in self._shards]
        self._any_record |= any(self._lengths)
        self._units = self._ordered()

    def _opened(self, numbers: list[int]) -> _Opened:
        opened: _Opened = []
        # The only block stays open. A shard that was missing is tried again in every epoch.
        kept = self._shards if self._one_block else []
        for number in numbers:
            try:
                shard = kept[number] if kept else None
                if shard is None:
                    shard = self.source.open(number)
                mark = fingerprint(self.source.urls[number])
                opened.append(_OpenShard(shard, shard.skipped, shard.unused, shard.examples, mark))
            except SkipSample as bad:
                opened.append(_OpenShard(None, Counter([bad.reason]), examples={bad.counter: bad.detail}))
        return opened

    def _ordered(self) -> Any:
        """The block's records in the order of this epoch, in groups that become one sample each."""
        key = [self.seed, zlib.crc32(self.name.encode()), self.epoch]
        rng = np.random.default_rng([*key, self.block] if self.block else key)
        total = sum(self._lengths)
        if self.config.questions_per_sample > 1:
            size = self.config.questions_per_sample
            grouped: list[list[int]] = []
            for group in self._by_image():
                order = [group[i] for i in rng.permutation(len(group))]
                grouped += [order[i : i + size] for i in range(0, len(order), size)]
            units: Any = [grouped[i] for i in rng.permutation(len(grouped))]
        else:
            units = rng.permutation(total)[:, None]  # an array: 8 bytes a record, not a list each
        return units if self._dealt else units[self.partition :: self.partitions]

    def _by_image(self) -> list[list[int]]:
        groups: dict[object, list[int]] = {}
        index = 0
        for shard, length in zip(self._shards, self._lengths, strict=True):
            for i in range(length):
                images = shard.images(i) if shard is not None and i < len(shard) else None
                groups.setdefault(index if images is None else ("images", images), []).append(index)
                index += 1
        return list(groups.values())

    @property
    def exhausted(self) -> bool:
        """Whether all epochs have been drawn."""
        return self.config.epochs is not None and self.epoch >= self.config.epochs

    def _skip_empty(self) -> None:
        """Move to the next block or epoch if the current one is finished."""
        start = self.epoch
        ends = self.config.epochs is not None
        while self.position >= len(self._units) and not self.exhausted:
            self.position = 0
            self.block += 1
            if self.block >= len(self._blocks(self.epoch)):
                self.block = 0
                self.epoch += 1
                self.taken.clear()
            if ends and self.epoch > start + 1:
                self.epoch = self.config.epochs or 0  # the other epochs are empty too
            nothing = self.exhausted and not self._any_record if ends else self.epoch > start + 1
            if nothing:
                empty = "fewer records than partitions" if self._any_record else "nothing in it"
                raise UserError(
                    f"source '{self.name}': nothing to read in {self.source.urls[0]} and the like{self.source.hint()} "
                    f"for partition {self.partition} of {self.partitions} ({self._why() or empty}): correct "
                    f"{config_key(self.name)}.path, or lower data.mixing.partitions"
                )
            if not self.exhausted:
                self._open()

    def _why(self) -> str:
        """The reasons why records were skipped when shards were opened, each with an example."""
        counts = self.left_out + Counter({k: v for k, v in self.counts.items() if k.startswith("unused/")})
        named = {key: self.examples.get(f"skipped/{key}") or self.examples.get(key) or [""] for key in counts}
        return ", ".join(f"{key}: {counts[key]} ({named[key][0]})" for key in counts)

    # --- the records

    def next(self) -> list[Sample]:
        """The samples of the next unit: usually one, and none if all its records were skipped
        (`counts` has them)."""
        epoch, only_capped = self.epoch, True
        samples: list[Sample] = []
        # A cap may skip a long rest of an epoch, which is no sign of bad data.
        while only_capped and self.epoch == epoch:
            only_capped, samples = self._unit()
            if self.position >= len(self._units):
                self._skip_empty()
            elif self.position * 2 >= len(self._units) and self._ahead is None:
                self._open_ahead()
        return samples

    def _unit(self) -> tuple[bool, list[Sample]]:
        """Whether a cap skipped all records of the unit, and the unit's samples."""
        unit = self._units[self.position]
        self.position += 1
        records: list[Record] = []
        capped = 0
        for index in map(int, unit):
            self.counts["seen"] += 1
            try:
                record = self._record(index)
                if self._capped(record):
                    capped += 1
                else:
                    records.append(record)
            except SkipSample as bad:
                self._bad(bad)
        if records:
            records = augment_together(records, self.augment, self._rng("augment", records[0].key), self.counts)
        samples: list[Sample] = []
        for record in records:
            try:
                parts = self.processor.samples(record, self.name, self._rng(record.key))
            except SkipSample as bad:
                self._bad(bad)
                if record.task in self.config.caps:
                    self.taken[record.task] -= 1
                continue
            if len(parts) > 1:
                self.counts["parts"] += len(parts) - 1
            for sample in parts:
                for event in sample.events:
                    self._example(event, sample.questions[0].key)
            samples += parts
        merged = merge_questions(samples, self.max_length)
        for sample in merged:
            self._count(sample)
        return capped == len(unit), merged

    def _rng(self, *stream: str) -> random.Random:
        return random.Random("/".join((str(self.seed), self.name, str(self.epoch), *stream)))

    def _record(self, index: int) -> Record:
        for shard, length in zip(self._shards, self._lengths, strict=True):
            if index < length:
                if shard is None or index >= len(shard):
                    raise SkipSample("shard_missing", f"{self.name}: a shard that was there when the block was begun")
                return shard.record(index)
            index -= length
        raise AssertionError("an index beyond the block")

    def _bad(self, bad: SkipSample) -> None:
        self.counts[bad.counter] += 1
        self._example(bad.counter, bad.detail)

    def _example(self, counter: str, words: str) -> None:
        if len(examples := self.examples.setdefault(counter, [])) < EXAMPLES:
            examples.append(words)

    def _capped(self, record: Record) -> bool:
        cap = self.config.caps.get(record.task)
        if cap is None:
            return False
        if self.taken[record.task] >= cap // self.partitions + (self.partition < cap % self.partitions):
            self.counts[f"capped/{record.task}"] += 1
            return True
        self.taken[record.task] += 1
        return False

    def _count(self, sample: Sample, sign: int = 1) -> None:
        self.counts["samples"] += sign * len(sample.questions)
        self.counts["tokens"] += sign * sample.length
        self.counts["targets"] += sign * sample.targets
        self.counts["images"] += sign * len(sample.images)
        for event, count in sample.events.items():
            self.counts[event] += sign * count

    def leave_out(self, sample: Sample, bad: SkipSample) -> None:
        """Count a drawn sample of this stream as skipped after all."""
        self._count(sample, -1)
        self.counts[bad.counter] += len(sample.questions)
        self._example(bad.counter, bad.detail)

    def _open_ahead(self) -> None:
        if self._one_block:
            return
        blocks = self._blocks(self.epoch)
        place = (self.epoch, self.block + 1)
        if place[1] >= len(blocks):
            place, blocks = (self.epoch + 1, 0), self._blocks(self.epoch + 1)
        self._ahead = place, _in_background(partial(self._opened, blocks[place[1]]))

    # --- the place

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "questions_per_sample": self.config.questions_per_sample,
            "shuffle_shards": self.config.shuffle_shards,
            "shards": len(self.source.urls),
            "epoch": self.epoch,
            "block": self.block,
            "position": self.position,
            "lengths": list(self._lengths),
            "fingerprints": dict(self._fingerprints),
            "taken": dict(self.taken),
            "counts": dict(self.counts),
            "left_out": dict(self.left_out),
            "indexed": self.indexed,
            "files": dict(self.files),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_place(state, self.name, self.seed, len(self.source.urls))
        self.epoch, self.block, self.position = state["epoch"], state["block"], state["position"]
        self._ahead = None
        if not self.exhausted:
            self._open(state["lengths"])
        self.taken = Counter(state["taken"])
        self.counts = Counter(state["counts"])
        self.files = Counter(state["files"])
        self.left_out = Counter(state["left_out"])
        self.indexed = state["indexed"]
        self._skip_empty()  # the files may hold less than they did
