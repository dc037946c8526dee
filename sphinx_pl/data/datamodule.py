"""Lightning's view of the data: an endless loader of packed micro-batches, and fixed held-out batches."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import queue
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Optional

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from sphinx_pl.data.augment import AugmentConfig
from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.readers import config_key, spread
from sphinx_pl.data.sampling.config import MODALITIES, Group, MixingConfig, SourceConfig, is_absent
from sphinx_pl.data.sampling.mixture import Mixture, check_names
from sphinx_pl.data.sampling.packing import (
    Collator,
    Lane,
    MicroPlan,
    PackingConfig,
    Planner,
    Row,
    check_lanes,
    first_fit_decreasing,
    merge_states,
    rows_of_lanes,
)
from sphinx_pl.data.sampling.stream import MADE, check_place
from sphinx_pl.data.schema import Batch, Sample
from sphinx_pl.data.skip import BadSample, Filtered, split_counter
from sphinx_pl.runtime import signals
from sphinx_pl.runtime.collectives import any_rank, of_all_ranks
from sphinx_pl.utils.config import build, within
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)

LOOKED_AT = 64
"""Records of a source that are looked at before a run."""
TRIED = 16
"""Of these, records with images, and records that cannot be used, after which it is enough."""
_EXPECTED = ("waiting", "unused/tasks", "unused/where", "unused/ratio")
"""Counters of what a later step trains on, and of what the configuration does not ask for."""


@dataclasses.dataclass
class DataConfig:
    """The section `data` of a configuration. Scripts other than train.py need only some of it."""

    root: Optional[str] = None
    """A folder that other keys refer to."""
    tokenizer: Optional[str] = None
    processor: ProcessorConfig = dataclasses.field(default_factory=ProcessorConfig)
    packing: Optional[PackingConfig] = None
    mixing: MixingConfig = dataclasses.field(default_factory=MixingConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    workers: int = within(1, at_least=0, at_most=1024)
    seed: int = within(0, at_least=0, at_most=2**32 - 1)
    val_samples: int = within(256, at_least=1)
    max_skipped: float = within(0.1, at_least=0, at_most=1)
    sources: Any = None
    """Name -> `sphinx_pl.data.sampling.mixture.SourceConfig`, or a group of these."""
    val_sources: Any = None
    test: Any = None


class _MicroBatches(Dataset[Batch]):
    """Plans in, decoded micro-batches out: what runs in the data workers."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getitem__(self, plan: MicroPlan) -> Batch:
        batch = self.collator(plan.rows)
        batch.window = plan.window
        return batch


class _Ahead:
    """Iterates over a planner in a thread of its own, `depth` plans ahead, so that reading annotations never waits for
    the training loop and the loop never waits for them."""

    def __init__(self, planner: Planner, depth: int) -> None:
        self.planner = planner
        self.depth = depth
        self.stop: Callable[[], None] = lambda: None
        """Ends the thread; by itself it ends only when the iterator is given up."""

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

        thread = threading.Thread(target=run, name="plan-windows", daemon=True)
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


class _Rows(Dataset[Batch]):
    def __init__(self, collator: Collator, batches: list[list[Row]]) -> None:
        self.collator = collator
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.collator(self.batches[index])


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signals.ignore()  # the run that it decodes for takes a step more and saves


def _as_is(batch: Any) -> Any:
    return batch


class TrainLoader:
    """Micro-batches, endless unless every source has `epochs`. Counts what was skipped and stops the run when it is too
    much.

    A window that lost all its images to unreadable files (or all its text) is left out and counted, since every step
    must hold both. With several ranks it is trained on as it is and counted: other ranks' images are part of the step.
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
        """Called whenever the next micro-batch is asked for, which may then have to be waited for."""
        self.collator = collator
        self.max_skipped = max_skipped
        self.counts: Counter[str] = Counter()
        """Of what this rank decoded since it was started."""
        self.before: Counter[str] = Counter()
        """Of what all ranks decoded before a run was continued; on the first rank alone."""
        self._start: Counter[str] = Counter()
        self._indexed_before: tuple[Counter[str], int] = Counter(), 0
        self._examples: dict[str, str] = {}  # of what was decoded
        self._told: set[str] = set()
        self._reached: int | None = None  # the last window that was handed out
        self._current: weakref.ref[Generator[Batch]] | None = None
        self._ahead = _Ahead(planner, 2 * workers * planner.accumulate) if workers else None
        self._loader = DataLoader(
            _MicroBatches(collator),
            sampler=self._ahead or planner,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            prefetch_factor=max(2, planner.accumulate // workers) if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Goes on after the last window that was handed out; an iterator from before ends."""
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
        total = indexed + left_out.total()
        self._refuse(left_out, left_out.total() / max(total, 1), total)
        for window in self._windows():
            for batch in window:
                for counter, example in batch.examples.items():
                    self._examples.setdefault(counter, example)
                self.counts.update(
                    {k: int(v) for k, v in batch.counters.items() if k.startswith(("skipped/", "samples"))}
                )
            self._reached = window[0].window
            self._check_skipped(self._reached)
            missing = [
                modality
                for modality in MODALITIES
                if any(f"modality/{modality}" in batch.counters for batch in window)
                and not any(batch.counters.get(f"modality/{modality}") for batch in window)
            ]
            if missing:
                self.counts[f"skipped/windows/without_{missing[0]}"] += 1
                if self.planner.world_size == 1 and not self.planner.finite:
                    continue
            for batch in window:
                yield batch
                self.asked()

    def _windows(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step, each with the weight of them all."""
        batches = iter(self._loader)
        try:
            yield from self._weighed(batches)
        finally:
            # Now, and not when the traceback that holds them is gone.
            if self._ahead is not None:
                self._ahead.stop()
                batches._shutdown_workers()  # type: ignore[attr-defined]  # there is no public way

    def _weighed(self, batches: Iterator[Batch]) -> Iterator[list[Batch]]:
        number = self.planner.number_consumed
        while True:
            window = list(itertools.islice(batches, self.planner.accumulate))
            # Ranks come to the end of a finite mixture in different steps: those that are through go on with empty
            # rows.
            if self.planner.finite and not any_rank(bool(window), self.planner.world_size):
                self.at_end()
                return
            if not window:
                empty: list[Row] = [[] for _ in range(self.planner.config.rows)]
                window = [self.collator(empty) for _ in range(self.planner.accumulate)]
                for batch in window:
                    batch.window = number
            number = window[0].window
            weight = sum(float(batch.weights.sum()) for batch in window)
            for i, batch in enumerate(window):
                batch.window_weight = weight
                batch.window_end = i == len(window) - 1
            yield window

    def _check_skipped(self, window: int) -> None:
        self._check_files(window)
        # Since this start, and of the lanes that this rank plans, of whose rows it decodes its part.
        planned = self.planner.drawn(window) - self._start
        decoded = {k: v * self.planner.ranks_of_class for k, v in self.counts.items()}
        skipped = Counter[str]()
        for counts in (planned, decoded):  # one counter may be of both
            skipped.update({key: count for key, count in counts.items() if key.startswith("skipped/")})
        self._tell(skipped)
        seen = sum(v for k, v in planned.items() if k.endswith("/seen"))
        if seen >= 200:
            # What could not be indexed is of all that was opened, of which only some has been seen.
            left_out, indexed = self.planner.left_out(window)
            left_out, indexed = left_out - self._indexed_before[0], indexed - self._indexed_before[1]
            lost = left_out.total() / max(left_out.total() + indexed, 1)
            self._refuse(skipped, lost + (1 - lost) * (skipped.total() - left_out.total()) / seen, seen)

    def _tell(self, skipped: Mapping[str, int]) -> None:
        """Warn of the first of each kind of what is skipped; the others are counted."""
        for counter in skipped.keys() - self._told:
            self._told.add(counter)
            if example := self.example(counter):
                log.warning("data: %s, such as %s; the others are counted", counter, example)

    def example(self, counter: str) -> str:
        """The first that this process met of a counter of what is skipped, in words; "" where it met none."""
        return self._examples.get(counter) or self.planner.example(counter)

    def _check_files(self, window: int) -> None:
        """A file that is lost counts once, however many records it had: files are compared with files."""
        opened, lost = self.planner.files(window)
        if opened >= 10 and lost > self.max_skipped * opened:
            raise UserError(
                f"data: {lost} of the first {opened} files could not be read, more than "
                f"data.max_skipped={self.max_skipped:.1%}: the log says why of each; repair them or raise the limit"
            )

    def _refuse(self, skipped: Mapping[str, int], share: float, seen: int) -> None:
        if share > self.max_skipped:
            worst = "; ".join(self._counted(k, v) for k, v in sorted(skipped.items(), key=lambda item: -item[1])[:5])
            raise UserError(
                f"data: {share:.1%} of {seen} samples could not be used, more than "
                f"data.max_skipped={self.max_skipped:.1%} ({worst}): repair these sources or raise the limit"
            )

    def _counted(self, counter: str, count: int) -> str:
        example = self.example(counter)
        return f"{counter}: {count}{f', such as {example}' if example else ''}"

    def summary(self, counters: Mapping[str, int]) -> list[str]:
        """For each source of which records were not used, or were changed, a line with numbers and examples.

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
        """This rank's part since the start of the run, to be summed over ranks: `source/seen`, `source/tokens`,
        `source/images`, ... when samples were drawn, `skipped/source/reason` then and when images were decoded."""
        own = self.planner.counts(self._reached) if self.planner.first_of_class else Counter()
        return dict(own + self.counts + self.before)

    @property
    def skipped(self) -> dict[str, int]:
        """Those of the counters that say what could not be used."""
        return {key: value for key, value in self.counters.items() if key.startswith("skipped/")}


class DataModule(L.LightningDataModule):
    """Built from `conf/data/*.yaml`.

    Args:
        processor: owns tokenizer and prompt format.
        sources: name -> source configuration of the training mixture.
        val_sources: the same for held-out losses; each is reported on its own.
        packing: `PackingConfig`'s keys.
        mixing: `MixingConfig`'s keys.
        augment: `AugmentConfig`'s keys.
        val_samples: at most so many samples of each held-out source.
        max_skipped: share of bad samples above which a run stops.
    """

    def __init__(
        self,
        processor: Processor,
        sources: dict[str, Any],
        val_sources: dict[str, Any],
        packing: dict[str, Any],
        workers: int = 1,
        seed: int = 0,
        val_samples: int = 256,
        max_skipped: float = 0.1,
        mixing: dict[str, Any] | None = None,
        augment: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.processor = processor
        self.sources = sources
        self.val_sources = {name: values for name, values in val_sources.items() if not is_absent(values)}
        self.packing = build(PackingConfig, packing, "data.packing")
        self.mixing = build(MixingConfig, mixing or {}, "data.mixing")
        self.augment = build(AugmentConfig, augment or {}, "data.augment")
        self.workers = workers
        self.seed = seed
        self.val_samples = val_samples
        self.max_skipped = max_skipped
        self.collator = Collator(self.packing.row_length, processor.image_size, self.packing.weighting)
        self._planner: Planner | None = None
        self._resume: dict[str, Any] | None = None
        self._train_loader: TrainLoader | None = None

    @classmethod
    def from_config(cls, values: dict[str, Any], model: Any) -> DataModule:
        """From the resolved `data` section and a model config, of which `Processor.from_dict` says what is read."""
        processor = Processor.from_dict(values.get("processor") or {}, values["tokenizer"], model)
        numbers = build(DataConfig, {k: v for k, v in values.items() if k in DataConfig.__dataclass_fields__}, "data")
        return cls(
            processor,
            values["sources"],
            values.get("val_sources") or {},
            values["packing"],
            numbers.workers,
            numbers.seed,
            numbers.val_samples,
            numbers.max_skipped,
            values.get("mixing"),
            values.get("augment"),
        )

    @property
    def val_names(self) -> list[str]:
        return list(self.val_sources)

    def check(self, text_required: bool = False, accumulate: int = 1, world_size: int = 1) -> None:
        """Whether the sources can be read, without reading them, and steps of this run be planned.

        Args:
            text_required: refuse a mixture without text-only data, which keeps the language ability; the planner puts
                text in every step where the mixture has it. Off only to measure what the text is good for.

        Raises:
            UserError: a wrong key, a missing file, or no text.
        """
        rows_of_lanes(self.packing.rows * accumulate * world_size, self.mixing.lanes or world_size, world_size)
        configs = dict(Group.from_dict({"sources": self.sources}).leaves())
        held_out = {n: SourceConfig.from_dict(n, values, "val_sources") for n, values in self.val_sources.items()}
        for name, config in [*configs.items(), *held_out.items()]:
            config.open(name)
            if config.modality == "image" and not self.processor.image_size:
                raise UserError(
                    f"source '{name}' has images but the model has no vision part (model.vision=null): leave it out, "
                    "or set its modality to text if no record has an image"
                )
        if text_required and not any(c.modality == "text" and c.weight > 0 for c in configs.values()):
            raise UserError(
                "data.sources has no text-only source, which pretraining needs in every step to keep the language "
                "ability: add one, or set stage.text_required=false"
            )

    def probe(self) -> None:
        """Read, tokenize and decode records of the first file of every source, as training and validation will.

        Raises:
            UserError: no record of a source can be used, or an option asks for what none has.
        """
        trained = dict(Group.from_dict({"sources": self.sources}).leaves())
        held_out = {n: SourceConfig.from_dict(n, values, "val_sources") for n, values in self.val_sources.items()}
        for section, configs in (("sources", trained), ("val_sources", held_out)):
            for name, config in configs.items():
                if config.weight > 0:
                    self._probe(name, config_key(name, section), config)

    def _probe(self, name: str, key: str, config: SourceConfig) -> None:
        source = config.open(name)
        try:
            shard = source.open(0)
        except BadSample as error:
            if len(source.urls) == 1:
                raise UserError(f"{key}: {source.urls[0]} cannot be read ({error})") from None
            log.warning("%s: %s", key, error)
            return
        if not len(shard) and len(source.urls) == 1:
            why = "; ".join(f"{counter}: {example}" for counter, example in shard.examples.items())
            raise UserError(f"{key}: nothing to read in {source.urls[0]}{source.hint()} ({why or 'nothing in it'})")
        source.check_shard(shard)
        bad: Counter[str] = Counter()
        examples: dict[str, str] = {}
        usable: Counter[str] = Counter()  # with an image, without one
        filtered: Counter[str] = Counter()
        few = spread(len(shard), TRIED)
        for index in few + [index for index in spread(len(shard), LOOKED_AT) if index not in few]:
            if usable["image"] + bad.total() >= TRIED:
                break
            try:
                record = shard.record(index)
                for sample in self.processor.samples(record, name):
                    if sample.length > self.packing.row_length:
                        raise BadSample("longer_than_row", f"{record.key}: {sample.length} tokens")
                for image in record.images:
                    load_image(image, self.processor.image_size)
                usable["image" if record.images else "text"] += 1
            except Filtered as reason:
                filtered[reason.reason] += 1
            except BadSample as reason:
                bad[reason.reason] += 1
                examples.setdefault(reason.reason, reason.detail)
        why = "; ".join(f"{reason}: {count}, such as {examples[reason]}" for reason, count in bad.most_common())
        where = source.folder_hint(key) if bad["image_missing"] else ""
        if bad["longer_than_row"]:
            where = f"raise data.packing.row_length={self.packing.row_length}"
        of_images = sum(count for reason, count in bad.items() if reason.startswith("image_"))
        if bad and (not usable or (of_images >= TRIED // 4 and not usable["image"])):
            what = "with images " if usable else ""
            raise UserError(
                f"{key}: none of the first {bad.total()} records {what}can be used ({why}){f'; {where}' * bool(where)}"
            )
        if bad:
            tried = bad.total() + usable.total()
            log.warning(
                "%s: %d of %d records that were tried cannot be used (%s) %s", key, bad.total(), tried, why, where
            )
        elif filtered and not usable:
            counts = ", ".join(f"{reason}: {count}" for reason, count in filtered.most_common())
            log.warning(
                "%s: the filters leave out all of %d records that were tried (%s)", key, filtered.total(), counts
            )

    def check_resume(self, state: Mapping[str, Any], accumulate: int = 1, world_size: int = 1) -> None:
        """Whether the position in the data of a training checkpoint is one of this run's data. Reads no data.

        Args:
            state: what `state_dict` gave.

        Raises:
            UserError: another seed, other sources, files, lanes, or another order of their records.
        """
        if not state:
            return
        planner = state["planner"]
        lanes = self._lanes(planner)
        rows_of_lanes(self.packing.rows * accumulate * world_size, lanes, world_size)
        group = Group.from_dict({"sources": self.sources, "temperature": self.mixing.temperature})
        configs = dict(group.leaves())
        names = group.shares(dict.fromkeys(configs, 1))
        files = {name: len(configs[name].open(name).urls) for name in names}
        for lane in planner["lanes"].values():
            places = lane["mixture"]["streams"]
            # A source without any record has no share where shares follow from sizes, which only reading shows.
            check_names(lane["mixture"], names if not group.needs_sizes else {*places} & {*names})
            for name, place in places.items():
                check_place(place, name, self.seed, files[name])
        for name, place in places.items():
            for key in ("branches", "shuffle_shards"):
                if (before := place.get(key, now := getattr(configs[name], key))) != now:
                    log.warning(
                        "data.sources.%s.%s=%s: the checkpoint was made with %s, and the order of the records follows "
                        "from it, so some of this epoch will be repeated and others skipped",
                        name,
                        key,
                        now,
                        before,
                    )

    def _lanes(self, state: Mapping[str, Any]) -> int:
        """How many lanes a run has that resumes at this position of a planner."""
        check_lanes(state, self.mixing.lanes or state.get("lane_count", 0))
        return int(state["lane_count"])

    def planner(self, accumulate: int = 1, rank: int = 0, world_size: int = 1, lanes: int | None = None) -> Planner:
        """A planner at the start of the stream.

        Args:
            lanes: those of the run that goes on; by default the configured number, else one for each rank.
        """
        lanes = lanes or self.mixing.lanes or world_size
        row_length = self.packing.row_length

        def lane(number: int) -> Lane:
            mixture = Mixture(
                self.sources, self.processor, self.seed, row_length, self.mixing, self.augment, number, lanes
            )
            return Lane(mixture, self.packing)

        return Planner(lane, lanes, self.packing, accumulate, rank, world_size)

    def train_dataloader(self) -> TrainLoader:
        trainer = self.trainer
        assert trainer is not None, "train_dataloader() is called by a Trainer"
        resume = self._resume
        lanes = self._lanes(resume["planner"]) if resume else None
        self._planner = self.planner(trainer.accumulate_grad_batches, trainer.global_rank, trainer.world_size, lanes)
        collator = dataclasses.replace(self.collator, sources=list(self._planner.mixture.streams))
        pin = trainer.strategy.root_device.type == "cuda"

        def at_end() -> None:
            log.info("every source has been read as often as its epochs say: training ends")
            trainer.should_stop = True

        self._train_loader = TrainLoader(self._planner, collator, self.workers, self.max_skipped, pin, at_end)
        if resume:
            self._planner.load_state_dict(resume["planner"])
            if trainer.is_global_zero:
                self._train_loader.before.update(resume["counts"])
            self._resume = None
        return self._train_loader

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return list(self.val_loaders(rank, world).values())

    def val_loaders(self, rank: int = 0, world_size: int = 1) -> dict[str, DataLoader[Batch]]:
        """Source name -> its held-out batches, the same ones at every call. All ranks get equally many."""
        loaders = {}
        for name, values in self.val_sources.items():
            samples = self._held_out(name, values)
            rows, _ = first_fit_decreasing(samples, len(samples), self.packing.row_length, self.packing.images_per_row)
            size = self.packing.rows
            count = -(-len(rows) // (size * world_size)) * world_size
            rows += [[] for _ in range(count * size - len(rows))]
            batches = [rows[i * size : (i + 1) * size] for i in range(rank, count, world_size)]
            loaders[name] = DataLoader(_Rows(self.collator, batches), batch_size=None, collate_fn=_as_is)
        return loaders

    def _held_out(self, name: str, values: dict[str, Any]) -> list[Sample]:
        source = SourceConfig.from_dict(name, values, "val_sources").open(name)
        samples: list[Sample] = []
        left_out: Counter[str] = Counter()
        events: Counter[str] = Counter()
        for index in spread(len(source), self.val_samples):
            try:
                sample = self.processor.sample(source.record(index), name)
            except BadSample as bad:
                left_out[bad.reason] += 1
                continue
            if sample.length <= self.packing.row_length:
                samples.append(sample)
                events.update(sample.events)
            else:
                left_out["too_long"] += 1
        if left_out:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.most_common())
            log.warning("data.val_sources.%s: %d samples left out (%s)", name, left_out.total(), reasons)
        if events:
            counts = ", ".join(f"{event}: {count}" for event, count in events.most_common())
            log.warning("data.val_sources.%s: of its %d samples, %s", name, len(samples), counts)
        if not samples:
            raise UserError(f"data.val_sources.{name}: no usable sample in {values['path']}")
        return samples

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self._planner is not None and self.trainer is not None and self.trainer.training and batch.window_end:
            self._planner.consumed(batch.window)
        return batch

    def counters(self) -> dict[str, int]:
        """Those of the training stream so far (`TrainLoader.counters`) of all ranks, which call it together."""
        if self._planner is None or self._train_loader is None:
            return {}
        return dict(sum(of_all_ranks(Counter(self._train_loader.counters), self._planner.world_size), Counter()))

    def teardown(self, stage: str) -> None:
        """Say at the end of training what was not used; all ranks call it together."""
        if stage != "fit" or self._planner is None or self._train_loader is None:
            return
        counters = self.counters()
        if self._planner.rank == 0:
            for line in self._train_loader.summary(counters):
                log.warning(line)

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks, which call it together."""
        if self._planner is None or self._train_loader is None:
            return {}
        states = of_all_ranks(self._planner.state_dict(), self._planner.world_size)
        decoded = self._train_loader.counts + self._train_loader.before
        counts = of_all_ranks(decoded, self._planner.world_size)
        return {"planner": merge_states(states), "counts": dict(sum(counts, Counter()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = state_dict or None
