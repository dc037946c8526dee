"""Lightning's view of the data: an endless loader of packed micro-batches, and fixed held-out batches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.mixture import Mixture, SourceConfig
from sphinx_pl.data.packing import Collator, PackingConfig, Planner, Row, WindowPlan, first_fit_decreasing
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.record import Batch, Sample
from sphinx_pl.data.sources import expand_paths, spread
from sphinx_pl.errors import UserError
from sphinx_pl.typed import build

log = logging.getLogger(__name__)


class _Windows(Dataset[list[Batch]]):
    """Plans in, decoded windows out: what runs in the data workers."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getitem__(self, plan: WindowPlan) -> list[Batch]:
        return self.collator.window(plan)


class _Rows(Dataset[Batch]):
    def __init__(self, collator: Collator, batches: list[list[Row]]) -> None:
        self.collator = collator
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.collator(self.batches[index])


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _as_is(batch: Any) -> Any:
    return batch


class TrainLoader:
    """Endless micro-batches. Counts what was skipped and stops the run when it is too much.

    A window that lost all its images to unreadable files (or all its text) is left out and counted, since every step
    must hold both. With several ranks it is trained on as it is and counted: other ranks' images are part of the step.
    """

    def __init__(
        self, planner: Planner, collator: Collator, workers: int, max_skipped: float, pin_memory: bool
    ) -> None:
        self.planner = planner
        self.max_skipped = max_skipped
        self.counts: Counter[str] = Counter()
        self._loader = DataLoader(
            _Windows(collator),
            sampler=planner,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=_one_thread,
            pin_memory=pin_memory,
            prefetch_factor=2 if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        left_out = self.planner.mixture.left_out
        indexed = sum(len(stream.source) for stream in self.planner.mixture.streams.values())
        self._refuse(left_out, indexed + sum(left_out.values()))
        for window in self._loader:
            for batch in window:
                self.counts.update(
                    {k: int(v) for k, v in batch.counters.items() if k.startswith(("skipped/", "samples"))}
                )
            self._check_skipped()
            missing = [
                m for m in self.planner.mixture.modalities if not any(b.counters.get(f"modality/{m}") for b in window)
            ]
            if missing:
                self.counts[f"skipped/windows/without_{missing[0]}"] += 1
                if self.planner.world_size == 1:
                    continue
            yield from window

    def _check_skipped(self) -> None:
        planned = self.planner.mixture.counts
        skipped = {k: v for k, v in [*planned.items(), *self.counts.items()] if "skipped/" in k}
        seen = sum(v for k, v in planned.items() if k.endswith("/seen"))
        if seen >= 200:
            self._refuse(skipped, seen)

    def _refuse(self, skipped: Mapping[str, int], seen: int) -> None:
        share = sum(skipped.values()) / max(seen, 1)
        if share > self.max_skipped:
            worst = ", ".join(f"{k}: {v}" for k, v in sorted(skipped.items(), key=lambda item: -item[1])[:5])
            raise UserError(
                f"data: {share:.1%} of {seen} samples could not be used, more than "
                f"data.max_skipped={self.max_skipped:.1%} ({worst}): repair these sources or raise the limit"
            )

    @property
    def skipped(self) -> dict[str, int]:
        """`source/skipped/reason` and `skipped/source/reason`: while indexing, and since the start of the run."""
        total = Counter(self.planner.mixture.left_out)
        total.update({k: v for k, v in [*self.planner.mixture.counts.items(), *self.counts.items()] if "skipped/" in k})
        return dict(total)


class DataModule(L.LightningDataModule):
    """Built from `conf/data/*.yaml`.

    Args:
        processor: owns tokenizer and prompt format.
        sources: name -> source configuration of the training mixture.
        val_sources: the same for held-out losses; each is reported on its own.
        packing: `PackingConfig`'s keys.
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
    ) -> None:
        super().__init__()
        self.processor = processor
        self.sources = sources
        self.val_sources = {name: values for name, values in val_sources.items() if values is not None}
        self.packing = build(PackingConfig, packing, "data.packing")
        self.workers = workers
        self.seed = seed
        self.val_samples = val_samples
        self.max_skipped = max_skipped
        self.collator = Collator(self.packing.row_length, processor.image_size, self.packing.weighting)
        self._planner: Planner | None = None
        self._resume: dict[str, Any] | None = None
        self._train_loader: TrainLoader | None = None

    @property
    def val_names(self) -> list[str]:
        return list(self.val_sources)

    def check(self, text_required: bool = False) -> None:
        """Whether the sources can be read, without reading them.

        Args:
            text_required: refuse a mixture without text-only data, which keeps the language ability; the planner puts
                text in every step where the mixture has it. Off only to measure what the text is good for.

        Raises:
            UserError: a wrong key, a missing file, or no text.
        """
        sources = {name: values for name, values in self.sources.items() if values is not None}
        configs = {name: SourceConfig.from_dict(name, values) for name, values in sources.items()}
        held_out = {n: SourceConfig.from_dict(n, values, "val_sources") for n, values in self.val_sources.items()}
        for name, config in [*configs.items(), *held_out.items()]:
            expand_paths(name, config.path)
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

    def planner(self, accumulate: int = 1, rank: int = 0, world_size: int = 1) -> Planner:
        """A planner at the start of the stream."""
        mixture = Mixture(self.sources, self.processor, self.seed, self.packing.row_length)
        return Planner(mixture, self.packing, accumulate, rank, world_size)

    def train_dataloader(self) -> TrainLoader:
        trainer = self.trainer
        assert trainer is not None, "train_dataloader() is called by a Trainer"
        self._planner = self.planner(trainer.accumulate_grad_batches, trainer.global_rank, trainer.world_size)
        if self._resume is not None:
            self._planner.load_state_dict(self._resume["planner"])
        pin = trainer.strategy.root_device.type == "cuda"
        self._train_loader = TrainLoader(self._planner, self.collator, self.workers, self.max_skipped, pin)
        if self._resume is not None:
            self._train_loader.counts.update(self._resume["counts"])
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
        for index in spread(len(source), self.val_samples):
            try:
                sample = self.processor.sample(source.record(index), name)
            except BadSample as bad:
                left_out[bad.reason] += 1
                continue
            if sample.length <= self.packing.row_length:
                samples.append(sample)
            else:
                left_out["too_long"] += 1
        if left_out:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.most_common())
            log.warning("data.val_sources.%s: %d samples left out (%s)", name, left_out.total(), reasons)
        if not samples:
            raise UserError(f"data.val_sources.{name}: no usable sample in {values['path']}")
        return samples

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self._planner is not None and self.trainer is not None and self.trainer.training and batch.window_end:
            self._planner.consumed(batch.window)
        return batch

    @property
    def skipped(self) -> dict[str, int]:
        """What the training stream had to leave out so far, by source and reason."""
        return self._train_loader.skipped if self._train_loader else {}

    def state_dict(self) -> dict[str, Any]:
        if self._planner is None or self._train_loader is None:
            return {}
        return {"planner": self._planner.state_dict(), "counts": dict(self._train_loader.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = state_dict or None
