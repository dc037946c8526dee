"""Rows -> `Batch`: the tensors of a planned micro-batch, with its images decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from sphinx_pl.data.images import load_image
from sphinx_pl.data.sampling.packing import WEIGHTINGS, Row
from sphinx_pl.data.sampling.partition import modality_of
from sphinx_pl.data.schema import IGNORE, IMAGE_SLOT, Batch, Sample
from sphinx_pl.data.skip import SkipSample, counter_of
from sphinx_pl.data.tasks import TASKS

TASK_NAMES = list(TASKS)


@dataclass
class Collator:
    """Makes a `Batch` of rows: decodes images, and removes the targets of samples whose images
    cannot be read.

    Args:
        row_length: T, positions of a row.
        image_size: S, pixels a side.
        weighting: a key of `WEIGHTINGS`.
        sources: names of all sources, so that a batch says where every target comes from; [] leaves
            that out.
    """

    row_length: int
    image_size: int
    weighting: str = "token"
    sources: list[str] = field(default_factory=list)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        # The arrays are filled in NumPy: torch takes several times as long for pieces as short as a
        # question.
        b, t, size = len(rows), self.row_length, self.image_size
        ids = np.zeros((b, t), np.int64)
        labels = np.full((b, t), IGNORE, np.int64)
        weights = np.zeros((b, t), np.float32)
        segments = np.zeros((b, t), np.int32)
        questions = np.zeros((b, t), np.int32)
        positions = np.zeros((b, t), np.int64)
        tasks = np.zeros((b, t), np.int32)
        sources = np.zeros((b, t), np.int32)
        pixels = torch.empty(sum(len(s.images) for row in rows for s in row), 3, size, size, dtype=torch.uint8)
        slots: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        kept_views: list[tuple[bool, ...]] = []
        keys: list[str] = []
        counters: Counter[str] = Counter(samples=0, images=0, pairs=0)  # also of rows that are empty
        examples: dict[str, str] = {}
        weigh = WEIGHTINGS[self.weighting]
        ascending = np.arange(t)
        decoded = 0

        for row, samples in enumerate(rows):
            at = 0
            for segment, sample in enumerate(samples, start=1):
                readable = self._decode(sample, counters, pixels[decoded:], examples)
                decoded += len(sample.images)
                kept_views += sample.kept_views
                counters["samples"] += len(sample.questions)
                counters["images"] += len(sample.images)
                counters["pairs"] += sample.pairs
                counters[f"modality/{modality_of(sample)}"] += int(readable)
                begin, end = at, at + sample.length
                flat = list(sample.prefix)
                for question in sample.questions:
                    flat += question.ids
                tokens = np.array(flat, np.int64)
                ids[row, begin:end] = np.maximum(tokens, 0)
                slots.append(row * t + begin + np.flatnonzero(tokens == IMAGE_SLOT))
                segments[row, begin:end] = segment
                if self.sources:
                    sources[row, begin:end] = self.sources.index(sample.source)
                prefix = len(sample.prefix)
                positions[row, at : at + prefix] = ascending[:prefix]
                at += prefix
                for number, question in enumerate(sample.questions, start=1):
                    n = len(question.ids)
                    positions[row, at : at + n] = ascending[prefix : prefix + n]
                    questions[row, at : at + n] = number
                    keys.append(f"{sample.source}/{question.key}")
                    targets = question.supervised.count(True)
                    if readable and targets:
                        places = at + np.flatnonzero(np.frombuffer(bytes(question.supervised), np.bool_)[1:])
                        labels[row, places] = tokens[places - begin + 1]
                        weights[row, places] = weigh(targets)
                        tasks[row, at : at + n] = TASK_NAMES.index(question.task)
                    at += n

        counters["tokens"] = int((segments > 0).sum())
        counters["positions"] = b * t
        if kept_views:
            counters["views"] = sum(map(sum, kept_views))
        counters["targets"] = int((labels != IGNORE).sum())
        return Batch(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            segment_ids=torch.from_numpy(segments),
            question_ids=torch.from_numpy(questions),
            position_ids=torch.from_numpy(positions),
            task_ids=torch.from_numpy(tasks),
            pixels=pixels,
            image_slots=torch.from_numpy(np.concatenate(slots)),
            kept_views=torch.tensor(kept_views) if kept_views else None,
            source_ids=torch.from_numpy(sources) if self.sources else None,
            tasks=TASK_NAMES,
            sources=self.sources,
            keys=keys,
            counters={key: float(value) for key, value in counters.items()},
            examples=examples,
        )

    def _decode(self, sample: Sample, counters: Counter[str], pixels: torch.Tensor, examples: dict[str, str]) -> bool:
        """Whether all images of the sample could be read.

        They are written to the first of `pixels`, [N, 3, S, S] uint8; one that cannot be read is
        black.
        """
        readable = True
        for number, ref in enumerate(sample.images):
            try:
                pixels[number] = load_image(ref, self.image_size)
            except SkipSample as error:
                readable = False
                counters[counter := counter_of(sample.source, error.counter)] += len(sample.questions)
                examples.setdefault(counter, error.detail)
                pixels[number] = 0
        return readable
