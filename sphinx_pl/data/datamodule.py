"""Lightning's data: an endless loader of packed micro-batches, and fixed held-out batches."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Optional

import lightning as L
from torch.utils.data import DataLoader, Dataset

from sphinx_pl.data.augment import AugmentConfig
from sphinx_pl.data.files import fingerprint
from sphinx_pl.data.probe import probe_source
from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.readers import config_key, spread
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.sampling.config import Group, MixingConfig, SourceConfig, is_absent
from sphinx_pl.data.sampling.mixture import Mixture, check_names
from sphinx_pl.data.sampling.packing import PackingConfig, Row, first_fit_decreasing
from sphinx_pl.data.sampling.partition import Partition
from sphinx_pl.data.sampling.planner import Planner, check_partitions, rows_of_partitions
from sphinx_pl.data.sampling.resume_state import merge_states, upgraded
from sphinx_pl.data.sampling.stream import check_place
from sphinx_pl.data.schema import Batch, Sample
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.train_loader import TrainLoader, as_is
from sphinx_pl.runtime.collectives import of_all_ranks
from sphinx_pl.utils.config import build, within
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass
class DataConfig:
    """The section `data` of a configuration. Scripts other than train.py need only a part of it."""

    root: Optional[str] = None
    """A folder to which other keys refer."""
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
    """Name -> `sphinx_pl.data.sampling.config.SourceConfig`, or a group of these."""
    val_sources: Any = None
    test: Any = None


class _HeldOutBatches(Dataset[Batch]):
    def __init__(self, collator: Collator, batches: list[list[Row]]) -> None:
        self.collator = collator
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.collator(self.batches[index])


class DataModule(L.LightningDataModule):
    """The data module of a run, built from `conf/data/*.yaml`.

    Args:
        processor: it owns the tokenizer and the prompt format.
        sources: name -> configuration of each source of the training mixture.
        val_sources: the same for held-out losses; each source is reported by itself.
        packing: the keys of `PackingConfig`.
        mixing: the keys of `MixingConfig`.
        augment: the keys of `AugmentConfig`.
        val_samples: the largest number of samples of each held-out source.
        max_skipped: share of skipped samples above which a run stops.
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
        """The data module of a resolved `data` section and a model config (`Processor.from_dict`
        names what it reads)."""
        if not values["tokenizer"]:
            raise UserError("data.tokenizer is null: name a tokenizer's file or folder, such as that of a checkpoint")
        processor = Processor.from_dict(values.get("processor") or {}, values["tokenizer"], model, grows=True)
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
        """Check that the sources exist and that steps of this run can be planned. No record is
        read.

        Args:
            text_required: refuse a mixture without text-only data, which keeps the language
                ability. The planner puts text in every step if the mixture has it. Switch it off
                only to measure the effect of the text.

        Raises:
            UserError: a key is wrong, a file is missing, or there is no text.
        """
        rows_of_partitions(
            self.packing.micro_batch_rows * accumulate * world_size, self.mixing.partitions or world_size, world_size
        )
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
        """Read, tokenize and decode records of every source's first file, as training and
        validation will.

        Raises:
            UserError: no record of a source can be used, or an option asks for what no record has.
        """
        trained = dict(Group.from_dict({"sources": self.sources}).leaves())
        held_out = {n: SourceConfig.from_dict(n, values, "val_sources") for n, values in self.val_sources.items()}
        for section, configs in (("sources", trained), ("val_sources", held_out)):
            for name, config in configs.items():
                if config.weight > 0:
                    probe_source(name, config_key(name, section), config, self.processor, self.packing.row_length)

    def check_resume(self, state: Mapping[str, Any], accumulate: int = 1, world_size: int = 1) -> None:
        """Check that a training checkpoint's position in the data belongs to this run's data. No
        data are read.

        Args:
            state: the result of `state_dict`.

        Raises:
            UserError: the seed, the sources, the number of their files or of partitions differ.
                Files with other contents are a warning.
        """
        if not state:
            return
        planner = upgraded(state)["planner"]
        partitions = self._partitions(planner)
        rows_of_partitions(self.packing.micro_batch_rows * accumulate * world_size, partitions, world_size)
        group = Group.from_dict({"sources": self.sources, "temperature": self.mixing.temperature})
        configs = dict(group.leaves())
        names = group.shares(dict.fromkeys(configs, 1))
        files = {name: configs[name].open(name).urls for name in names}
        changed: dict[str, str] = {}
        for partition in planner["partitions"].values():
            places = partition["mixture"]["streams"]
            # If shares follow from sizes, a source without records has no share. Only reading would
            # show that.
            check_names(partition["mixture"], names if not group.needs_sizes else {*places} & {*names})
            for name, place in places.items():
                check_place(place, name, self.seed, len(files[name]))
                for number, mark in place.get("fingerprints", {}).items():
                    if fingerprint(path := files[name][int(number)]) not in (mark, None):
                        changed[path] = name
        for path, name in changed.items():
            log.warning(
                "source '%s': %s has changed since the checkpoint was made: its records keep their old places until "
                "the end of this epoch, so some may be repeated and others skipped",
                name,
                path,
            )
        for name, place in places.items():
            for key in ("questions_per_sample", "shuffle_shards"):
                if (before := place.get(key, now := getattr(configs[name], key))) != now:
                    log.warning(
                        "data.sources.%s.%s=%s: the checkpoint was made with %s, and the order of the records follows "
                        "from it, so some of this epoch will be repeated and others skipped",
                        name,
                        key,
                        now,
                        before,
                    )

    def ends_at(self, state: Mapping[str, Any]) -> bool:
        """Whether a training checkpoint's position is the end of this run's data. No data are read.

        Args:
            state: the result of `state_dict`.
        """
        if not state:
            return False
        configs = dict(Group.from_dict({"sources": self.sources}).leaves())
        epochs = {name: config.epochs or self.mixing.epochs or math.inf for name, config in configs.items()}
        return all(
            not partition["pending"]
            and all(place["epoch"] >= epochs[name] for name, place in partition["mixture"]["streams"].items())
            for partition in upgraded(state)["planner"]["partitions"].values()
        )

    def _partitions(self, state: Mapping[str, Any]) -> int:
        """The number of partitions of a run that resumes at this position of a planner."""
        check_partitions(state, self.mixing.partitions or state.get("partition_count", 0))
        return int(state["partition_count"])

    def planner(
        self, accumulate: int = 1, rank: int = 0, world_size: int = 1, partitions: int | None = None
    ) -> Planner:
        """A planner at the start of the stream.

        Args:
            partitions: those of a resumed run; by default the configured number, else one for each
                rank.
        """
        partitions = partitions or self.mixing.partitions or world_size
        row_length = self.packing.row_length

        def partition(number: int) -> Partition:
            mixture = Mixture(
                self.sources, self.processor, self.seed, row_length, self.mixing, self.augment, number, partitions
            )
            return Partition(mixture, self.packing)

        return Planner(partition, partitions, self.packing, accumulate, rank, world_size)

    def train_dataloader(self) -> TrainLoader:
        trainer = self.trainer
        assert trainer is not None, "train_dataloader() is called by a Trainer"
        resume = self._resume
        partitions = self._partitions(resume["planner"]) if resume else None
        self._planner = self.planner(
            trainer.accumulate_grad_batches, trainer.global_rank, trainer.world_size, partitions
        )
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
        """Source name -> its held-out batches, the same at every call. All ranks get equally many."""
        loaders = {}
        for name, values in self.val_sources.items():
            samples = self._held_out(name, values)
            rows, _ = first_fit_decreasing(samples, len(samples), self.packing.row_length, self.packing.images_per_row)
            size = self.packing.micro_batch_rows
            count = -(-len(rows) // (size * world_size)) * world_size
            rows += [[] for _ in range(count * size - len(rows))]
            batches = [rows[i * size : (i + 1) * size] for i in range(rank, count, world_size)]
            loaders[name] = DataLoader(_HeldOutBatches(self.collator, batches), batch_size=None, collate_fn=as_is)
        return loaders

    def _held_out(self, name: str, values: dict[str, Any]) -> list[Sample]:
        source = SourceConfig.from_dict(name, values, "val_sources").open(name)
        samples: list[Sample] = []
        left_out: Counter[str] = Counter()
        events: Counter[str] = Counter()
        for index in spread(len(source), self.val_samples):
            try:
                sample = self.processor.sample(source.record(index), name)
            except SkipSample as bad:
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
        if self._planner is not None and self.trainer is not None and self.trainer.training and batch.ends_step:
            self._planner.consumed(batch.step)
        return batch

    def counters(self) -> dict[str, int]:
        """The counters of training so far over all ranks, which call this together."""
        if self._planner is None or self._train_loader is None:
            return {}
        return dict(sum(of_all_ranks(Counter(self._train_loader.counters), self._planner.world_size), Counter()))

    def teardown(self, stage: str) -> None:
        """Log at the end of training what was not used. All ranks call this together."""
        if stage != "fit" or self._planner is None or self._train_loader is None:
            return
        counters = self.counters()
        if self._planner.rank == 0:
            for line in self._train_loader.summary(counters):
                log.warning(line)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data of all ranks, which call this together."""
        if self._planner is None or self._train_loader is None:
            return {}
        states = of_all_ranks(self._planner.state_dict(), self._planner.world_size)
        decoded = self._train_loader.counts + self._train_loader.before
        counts = of_all_ranks(decoded, self._planner.world_size)
        return {"planner": merge_states(states), "counts": dict(sum(counts, Counter()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = upgraded(state_dict) if state_dict else None
