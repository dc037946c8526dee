"""Handmade micro-batches, so that a test knows what each rank has in each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import build_reader
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.schema import IGNORE, Batch, Record, Sample
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.stages import Stage
from tests.conftest import tiny_model
from tests.stages.test_stage import trainer


class Stream:
    """A stream without a length, like the project's own.

    For one with a length, Lightning subtracts the batches of an earlier run.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Written(L.LightningDataModule):
    """The batches of each rank: rank r trains on `of_ranks[r]`, in this order."""

    def __init__(self, processor: Processor, of_ranks: Sequence[Sequence[Batch]]) -> None:
        super().__init__()
        self.processor = processor
        self.of_ranks = of_ranks

    def train_dataloader(self) -> Stream:
        assert self.trainer is not None
        return Stream(self.of_ranks[self.trainer.global_rank])


class Samples:
    """Consecutive samples of the sample world."""

    def __init__(
        self,
        processor: Processor,
        folder: Path,
        row_length: int = 96,
        crop: tuple[int, int, int, int] | None = None,
    ) -> None:
        self.processor = processor
        self.crop = crop
        self.collator = Collator(row_length, processor.image_size)
        self._pictures = build_reader("image_text", "real", str(folder / "real/train-*.tar"))
        self._number = 0

    def image(self) -> Sample:
        self._number += 1
        record = self._pictures.record(self._number)
        record = dataclasses.replace(
            record, images=tuple(dataclasses.replace(i, crop=self.crop) for i in record.images)
        )
        return self.processor.sample(record, "real")

    def text(self, words: str = "red") -> Sample:
        self._number += 1
        record = Record(f"{self._number}", "text", answer=f"{words}\n")
        return self.processor.sample(record, "text")

    def batch(self, *rows: Sample) -> Batch:
        """Return a batch with a sample in each row."""
        return self.collator([[sample] for sample in rows])


def without_targets(batch: Batch) -> Batch:
    return dataclasses.replace(
        batch, labels=torch.full_like(batch.labels, IGNORE), weights=torch.zeros_like(batch.weights)
    )


def by_step(of_ranks: Sequence[Sequence[Batch]], accumulate: int) -> list[list[Batch]]:
    """The same with what a batch says of its step."""
    out = []
    for batches in of_ranks:
        described: list[Batch] = []
        for first in range(0, len(batches), accumulate):
            micro_batches = batches[first : first + accumulate]
            weight = sum(float(batch.weights.sum()) for batch in micro_batches)
            described += [
                dataclasses.replace(
                    b, step_weight=weight, ends_step=i == len(micro_batches) - 1, step=first // accumulate
                )
                for i, b in enumerate(micro_batches)
            ]
        out.append(described)
    return out


def one_after_another(of_ranks: Sequence[Sequence[Batch]]) -> list[Batch]:
    """Return the batches that one process trains on in place of these ranks, as additional
    micro-batches.
    """
    return [batch for together in zip(*of_ranks, strict=True) for batch in together]


def fit_written(
    strategy: Any,
    of_ranks: Sequence[Sequence[Batch]],
    processor: Processor,
    out: Path,
    *,
    accumulate: int = 1,
    parts: Sequence[str],
    model: SphinxConfig | None = None,
    optim: dict[str, Any] | None = None,
    callbacks: Sequence[L.Callback] = (),
    resume: Path | None = None,
    init_from: Path | None = None,
    **options: Any,
) -> tuple[Stage, L.Trainer]:
    """Train on all batches and leave a checkpoint in `out`.

    Without a strategy it trains in this process alone.
    """
    torch.manual_seed(0)
    data = Written(processor, by_step(of_ranks, accumulate))
    steps = len(of_ranks[0]) // accumulate
    stage_options = {key: options.pop(key) for key in ("checkpointing", "max_nonfinite") if key in options}
    stage = Stage(
        model or tiny_model(),
        "test",
        list(parts),
        {"lr": 0.05, "kind": "sgd", "weight_decay": 0.1} | (optim or {}),
        max_steps=20,
        init_from=str(init_from) if init_from else None,
        **stage_options,
    )
    stage.resumed = resume is not None
    options = {"gradient_clip_val": 0.5, "max_steps": steps} | options
    if strategy is not None:
        options |= {"strategy": strategy, "devices": len(of_ranks), "use_distributed_sampler": False}
    run = trainer(
        out,
        accumulate_grad_batches=accumulate,
        callbacks=[*callbacks, ResumeCheckpoint(str(out), every_n_steps=1, keep=99)],
        **options,
    )
    run.fit(stage, data, ckpt_path=resume, weights_only=True)
    return stage, run
