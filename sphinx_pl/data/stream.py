"""One lane's part of a source, epoch after epoch in a new order, and the place that was reached.

A *lane* is an independent line of planning: its own part of every source, its own packer. How many there are is fixed
for a run, so the order of the data does not depend on how many ranks or workers serve them. Shards are dealt to the
lanes; a source with few shards is opened by all, and each takes every `lanes`-th record.

Shards are opened `shuffle_shards` at a time (a *block*), and the records of a block are shuffled together. All of it
is a function of (seed, source, epoch, block): the place is a few integers.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from sphinx_pl.data.augment import AugmentConfig, augment_together
from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.processor import Processor, merge_branches
from sphinx_pl.data.record import Record, Sample
from sphinx_pl.data.sources import Shard, Source
from sphinx_pl.errors import UserError

if TYPE_CHECKING:
    from sphinx_pl.data.mixture import SourceConfig

# From so many shards a lane on, shards are dealt; below it the lanes' parts would differ too much.
_SHARDS_A_LANE = 8

EXAMPLES = 3
"""Of what was left out, kept for each reason."""

# Opens the next block's shards (an index, perhaps a download) while the present one is being read.
_OPENER = ThreadPoolExecutor(1, thread_name_prefix="open-shards")

_Opened = list[tuple[Shard | None, Counter[str]]]


class SourceStream:
    """Samples of a source, for ever or for so many epochs.

    Args:
        max_length: questions about one image are joined up to so many tokens.
        lane, lanes: which part of the source.

    Raises:
        UserError: the source has nothing to read.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        source: Source,
        processor: Processor,
        seed: int,
        max_length: int,
        augment: AugmentConfig | None = None,
        lane: int = 0,
        lanes: int = 1,
    ) -> None:
        self.augment = augment or AugmentConfig()
        self.name = name
        self.config = config
        self.source = source
        self.processor = processor
        self.seed = seed
        self.max_length = min(max_length, processor.config.max_length)
        self.lane = lane
        self.lanes = lanes
        self.counts: Counter[str] = Counter()
        """seen, samples, tokens, targets, images, skipped/<reason>, filtered/<reason>, capped/<task>."""
        self.left_out: Counter[str] = Counter()
        """What was unreadable when shards were opened: reason -> count."""
        self.examples: dict[str, list[str]] = {}
        """A counter's name -> the first few that it counted, in words. Of this process, not a part of the place."""
        self.epoch = 0
        self.block = 0
        self.position = 0
        self.taken: Counter[str] = Counter()
        """Records of each task with a cap in this epoch."""
        self._shards: list[Shard | None] = []
        self._lengths: list[int] = []
        self._units: Any = []  # lists of indices, or an [n, 1] array of them
        self._ahead: tuple[tuple[int, int], Future[_Opened]] | None = None
        self._open()
        self._skip_empty()

    # --- the order

    @property
    def _one_block(self) -> bool:
        """Whether all shards are open together, and stay so."""
        count = len(self.source.urls)
        return count <= self.config.shuffle_shards and (self.lanes == 1 or not self._dealt)

    @property
    def _dealt(self) -> bool:
        return len(self.source.urls) >= _SHARDS_A_LANE * self.lanes

    def _blocks(self, epoch: int) -> list[list[int]]:
        """The shards of each of this lane's blocks in an epoch."""
        count, size = len(self.source.urls), self.config.shuffle_shards
        if self._one_block:
            return [list(range(count))]
        order = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), epoch, 1 << 20]).permutation(count)
        if self._dealt:
            order = order[self.lane :: self.lanes]
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]

    def _open(self, lengths: list[int] | None = None) -> None:
        """Open the present block and order its records; `lengths` are those of its shards when it was begun."""
        place = (self.epoch, self.block)
        if self._ahead is not None and self._ahead[0] == place:
            opened = self._ahead[1].result()
        elif self._one_block and self._shards:
            opened = [(shard, Counter()) for shard in self._shards]
        else:
            opened = self._opened(self._blocks(self.epoch)[self.block])
        self._ahead = None
        self._shards = [shard for shard, _ in opened]
        for _, bad in opened:
            if self._dealt or self.lane == 0:  # else every lane would count it
                self.left_out.update(bad)
        self._lengths = lengths or [len(shard) if shard else 0 for shard in self._shards]
        self._units = self._ordered()

    def _opened(self, numbers: list[int]) -> _Opened:
        opened: _Opened = []
        for number in numbers:
            try:
                shard = self.source.open(number)
                opened.append((shard, shard.skipped))
            except BadSample as bad:
                opened.append((None, Counter([bad.reason])))
        return opened

    def _ordered(self) -> Any:
        """The block's records in the order of this epoch, in units that become one sample."""
        key = [self.seed, zlib.crc32(self.name.encode()), self.epoch]
        rng = np.random.default_rng([*key, self.block] if self.block else key)
        total = sum(self._lengths)
        if self.config.branches > 1:
            size = self.config.branches
            grouped: list[list[int]] = []
            for group in self._by_image():
                order = [group[i] for i in rng.permutation(len(group))]
                grouped += [order[i : i + size] for i in range(0, len(order), size)]
            units: Any = [grouped[i] for i in rng.permutation(len(grouped))]
        else:
            units = rng.permutation(total)[:, None]  # an array: 8 bytes a record, not a list each
        return units if self._dealt else units[self.lane :: self.lanes]

    @property
    def indexed(self) -> int:
        """Records of the present block, in all lanes that read it."""
        return sum(self._lengths)

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
        """Whether all its epochs have been drawn."""
        return self.config.epochs is not None and self.epoch >= self.config.epochs

    def _skip_empty(self) -> None:
        """Go on to the next block or epoch where the present one is finished."""
        start = self.epoch
        while self.position >= len(self._units) and not self.exhausted:
            self.position = 0
            self.block += 1
            if self.block >= len(self._blocks(self.epoch)):
                self.block = 0
                self.epoch += 1
                self.taken.clear()
            if self.epoch > start + 1:
                raise UserError(
                    f"source '{self.name}': nothing to read in {self.source.urls[0]} and the like for lane {self.lane} "
                    f"of {self.lanes} ({dict(self.left_out) or 'fewer records than lanes'}): correct data.sources."
                    f"{self.name}.path, or lower data.mixing.lanes"
                )
            if not self.exhausted:
                self._open()

    # --- the records

    def next(self) -> list[Sample]:
        """The next unit's samples: usually one, none if all of its records were bad (counted in `counts`)."""
        unit = self._units[self.position]
        self.position += 1
        records: list[Record] = []
        for index in map(int, unit):
            self.counts["seen"] += 1
            try:
                record = self._record(index)
                if not self._capped(record):
                    records.append(record)
            except BadSample as bad:
                self.counts[bad.counter] += 1
        if records:
            records = augment_together(records, self.augment, self._rng("augment", records[0].key))
        samples: list[Sample] = []
        for record in records:
            try:
                samples += self.processor.samples(record, self.name, self._rng(record.key))
            except BadSample as bad:
                self.counts[bad.counter] += 1
                if len(examples := self.examples.setdefault(bad.counter, [])) < EXAMPLES:
                    examples.append(bad.detail)
        merged = merge_branches(samples, self.max_length)
        self._count(merged)
        if self.position >= len(self._units):
            self._skip_empty()
        elif self.position * 2 >= len(self._units) and self._ahead is None:
            self._open_ahead()
        return merged

    def _rng(self, *stream: str) -> random.Random:
        return random.Random("/".join((str(self.seed), self.name, str(self.epoch), *stream)))

    def _record(self, index: int) -> Record:
        for shard, length in zip(self._shards, self._lengths, strict=True):
            if index < length:
                if shard is None or index >= len(shard):
                    raise BadSample("shard_missing", f"{self.name}: a shard that was there when the block was begun")
                return shard.record(index)
            index -= length
        raise AssertionError("an index beyond the block")

    def _capped(self, record: Record) -> bool:
        cap = self.config.caps.get(record.task)
        if cap is None:
            return False
        if self.taken[record.task] >= cap // self.lanes + (self.lane < cap % self.lanes):
            self.counts[f"capped/{record.task}"] += 1
            return True
        self.taken[record.task] += 1
        return False

    def _count(self, samples: list[Sample]) -> None:
        for sample in samples:
            self.counts["samples"] += len(sample.branches)
            self.counts["tokens"] += sample.length
            self.counts["targets"] += sample.targets
            self.counts["images"] += len(sample.images)

    def _open_ahead(self) -> None:
        if self._one_block:
            return
        blocks = self._blocks(self.epoch)
        place = (self.epoch, self.block + 1)
        if place[1] >= len(blocks):
            place, blocks = (self.epoch + 1, 0), self._blocks(self.epoch + 1)
        self._ahead = place, _OPENER.submit(self._opened, blocks[place[1]])

    # --- the place

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "block": self.block,
            "position": self.position,
            "lengths": list(self._lengths),
            "taken": dict(self.taken),
            "counts": dict(self.counts),
            "left_out": dict(self.left_out),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.block, self.position = state["epoch"], state["block"], state["position"]
        self._ahead = None
        self._shards = []
        if not self.exhausted:
            self._open(state["lengths"])
        self.taken = Counter(state["taken"])
        self.counts = Counter(state["counts"])
        self.left_out = Counter(state["left_out"])
