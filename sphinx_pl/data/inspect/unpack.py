"""The samples of a batch, read back from its tensors and the plan that it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate as running_sums
from itertools import groupby, pairwise

from torch import Tensor

from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.planner import MicroPlan
from sphinx_pl.data.schema import IGNORE, Batch, ImageRef, Sample, SampleQuestion
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Token:
    """One position. `image` is the number of the image that it shows, from 1; 0 for text."""

    id: int
    target: bool
    weight: float
    image: int


@dataclass(frozen=True)
class SampleImage:
    """An image as the batch holds it. `problem` says why it could not be read."""

    pixels: Tensor
    kept_views: tuple[bool, ...]
    problem: str = ""


@dataclass(frozen=True)
class ShownSample:
    """A sample of a batch: the tokens that questions share, those of each, and the images."""

    number: int
    place: str
    sample: Sample
    shared: list[Token]
    questions: list[tuple[SampleQuestion, list[Token]]]
    pictures: list[SampleImage]

    @property
    def broken(self) -> bool:
        return any(picture.problem for picture in self.pictures)

    @property
    def targets(self) -> int:
        return sum(token.target for _, tokens in self.questions for token in tokens)


def unpack(batch: Batch, plan: MicroPlan, processor: Processor, first: int) -> list[ShownSample]:
    """The samples of a batch, numbered from `first`, in the order of its rows."""
    items: list[ShownSample] = []
    image = 0
    for row, samples in enumerate(plan.rows):
        begin = 0
        for sample in samples:
            counts = processor.slots(len(sample.images), sample.kept_views)
            tokens = _tokens(batch, row, begin, sample.length, counts)
            ends = [0, *running_sums([len(sample.prefix), *(len(question.ids) for question in sample.questions)])]
            parts = [tokens[a:b] for a, b in pairwise(ends)]
            questions = list(zip(sample.questions, parts[1:], strict=True))
            masked = sample.targets > 0 and not any(token.target for token in tokens)
            pictures = []
            for i, ref in enumerate(sample.images):
                views = batch.kept_views
                kept_views = tuple(views[image + i].tolist()) if views is not None and sample.kept_views else ()
                problem = _problem(ref, processor.image_size) if masked else ""
                pictures.append(SampleImage(batch.pixels[image + i], kept_views, problem))
            place = f"step {plan.step}, micro-batch {plan.index + 1}, row {row + 1}"
            items.append(ShownSample(first + len(items), place, sample, parts[0], questions, pictures))
            image += len(sample.images)
            begin += sample.length
    return items


def _tokens(batch: Batch, row: int, begin: int, length: int, slots: Sequence[int]) -> list[Token]:
    """The positions of one sample. `slots` has the number of visual tokens of each of its images."""
    width = batch.input_ids.shape[1]
    offset = row * width + begin
    at_slot = set((batch.image_slots - offset).tolist())
    numbers = [number for number, count in enumerate(slots, start=1) for _ in range(count)]
    ids = batch.input_ids[row, begin : begin + length].tolist()
    # A label is at the position where the model predicts it: one before the token.
    labels = [IGNORE, *batch.labels[row, begin : begin + length - 1].tolist()]
    weights = [0.0, *batch.weights[row, begin : begin + length - 1].tolist()]
    taken = iter(numbers)
    return [
        Token(id, label != IGNORE, weight, next(taken) if i in at_slot else 0)
        for i, (id, label, weight) in enumerate(zip(ids, labels, weights, strict=True))
    ]


def _problem(ref: ImageRef, size: int) -> str:
    """Why an image cannot be read; "" if it can."""
    try:
        load_image(ref, size)
    except SkipSample as bad:
        return str(bad)
    return ""


def texts(item: ShownSample, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(text that is not supervised, supervised text) of each question, with the shared text."""
    for _, tokens in item.questions:
        parts: dict[bool, list[str]] = {False: [], True: []}
        for target, run in groupby([*item.shared, *tokens], key=lambda token: token.target):
            parts[target].append(tokenizer.decode([token.id for token in run if not token.image]))
        yield "\n".join(parts[False]), "\n".join(parts[True])
