"""Records -> token ids, for training and for prompts. Saved with the model, which is of no use without its format."""

from __future__ import annotations

import dataclasses
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.conversation import END_OF_TURN, SYSTEM, Rendered, is_document, render
from sphinx_pl.data.geometry import Geometry, Size, seen_views
from sphinx_pl.data.images import image_size
from sphinx_pl.data.record import IMAGE_SLOT, Branch, ImageRef, Record, Sample, Turn
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.data.tokenizer import Tokenizer
from sphinx_pl.errors import UserError
from sphinx_pl.typed import build, within

PLACEHOLDER = "<image>"


@dataclass
class ProcessorConfig:
    """How text is written: the conversation's system text, decimals of coordinates, the longest sample in tokens."""

    system: str = SYSTEM
    decimals: int = within(3, at_least=1, at_most=6)
    max_length: int = within(2048, at_least=1, at_most=2**24)


@dataclass(frozen=True, slots=True)
class PromptSample:
    """A prompt in ids (IMAGE_SLOT where visual tokens go) and the images that fill the slots."""

    ids: list[int]
    images: tuple[ImageRef, ...]
    seen: tuple[tuple[bool, ...], ...] = ()  # see `Sample`


@dataclass
class Processor:
    """Owns the tokenizer, the conversation format and the geometry's text form.

    `tokens_per_image` and `image_size` are the model's, given by the caller since data does not import models; so are
    `view_tokens`, those of each view, where the model skips views that show only padding.
    """

    config: ProcessorConfig
    tokenizer: Tokenizer
    tokens_per_image: int
    image_size: int
    image_position: str = "after_bos"
    view_tokens: tuple[int, ...] = ()
    geometry: Geometry = field(init=False)

    def __post_init__(self) -> None:
        self.geometry = Geometry(decimals=self.config.decimals)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    @classmethod
    def from_dict(cls, values: dict[str, Any], tokenizer_file: str | Path, model: Any) -> Processor:
        """From `to_dict()`'s mapping, a tokenizer file and a model config (read for its image geometry only).

        Raises:
            UserError: the tokenizer has more pieces than the model's vocabulary.
        """
        tokenizer = Tokenizer(tokenizer_file)
        if tokenizer.vocab_size > model.decoder.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces but model.decoder.vocab_size is "
                f"{model.decoder.vocab_size}: use the tokenizer that the model was made for, or enlarge the vocabulary"
            )
        return cls(
            build(ProcessorConfig, values, "data.processor"),
            tokenizer,
            tokens_per_image=model.tokens_per_image,
            image_size=model.vision.image_size if model.vision else 0,
            image_position=model.image_position,
            view_tokens=tuple(model.vision.view_tokens) if model.vision and model.vision.skip_padding else (),
        )

    @property
    def stop_sequences(self) -> list[list[int]]:
        """Ids that end an answer: `\\n###` as it is tokenized after a word and at a start."""
        after_word = self.tokenizer.encode("a" + END_OF_TURN)[len(self.tokenizer.encode("a")) :]
        at_start = self.tokenizer.encode(END_OF_TURN)
        return [after_word, at_start] if after_word != at_start else [after_word]

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, without what follows an end of turn."""
        return self.tokenizer.decode(ids).split(END_OF_TURN)[0].strip()

    def sample(self, record: Record, source: str, rng: random.Random | None = None) -> Sample:
        """One record as a sample with one branch, cut at `max_length` tokens.

        Raises:
            BadSample: the record lacks what its task needs, or `max_length` tokens hold no answer or not every image.
        """
        return self.samples(record, source, rng)[0]

    def samples(self, record: Record, source: str, rng: random.Random | None = None) -> list[Sample]:
        """As `sample`; but what is cut off a plain document makes further samples, so that nothing of it is lost.

        Raises:
            BadSample: as `sample`.
        """
        budget = self.config.max_length
        if len(record.images) > budget:  # before each of them is opened for its size
            raise BadSample("too_long", f"{len(record.images)} images in {budget} tokens")
        turns = self._place(TASKS[record.task].turns(record, self.geometry, rng), record)
        seen = self._seen(self.sizes(record.images))
        slots = self.slots(len(record.images), seen)
        rest: list[int] = []
        rendered = render(turns, self.config.system)
        if not is_document(turns):
            ids, supervised = self._tokens(rendered, record, slots, budget)
        else:
            if record.images:
                ids, supervised = self._tokens(rendered, record, slots)
            else:  # all of it is supervised: a book needs no spans, which would take a hundred times its bytes
                ids = [self.tokenizer.bos_id, *self.tokenizer.encode(rendered.text)]
                supervised = [False] + [True] * (len(ids) - 1)
            # A plain document also teaches where a text ends.
            ids, supervised = [*ids, self.tokenizer.eos_id], [*supervised, True]
            rest = ids[budget:]
        ids, supervised = ids[:budget], supervised[:budget]  # cut on the right, as the original does
        if not any(supervised):
            raise BadSample("too_long", f"no answer within {budget} tokens")
        if ids.count(IMAGE_SLOT) < sum(slots):
            raise BadSample("too_long", f"an image is not within {budget} tokens")
        # The prefix shared by all branches can reach at most to the first supervised token.
        samples = [Sample([], [Branch(ids, supervised, record.task, record.key)], record.images, source, seen)]
        for number, start in enumerate(range(0, len(rest), budget - 1), start=2):
            part = [self.tokenizer.bos_id, *rest[start : start + budget - 1]]
            branch = Branch(part, [False] + [True] * (len(part) - 1), record.task, f"{record.key}#{number}")
            samples.append(Sample([], [branch], (), source))
        return samples

    def prompt(self, record: Record, sizes: Sequence[Size] | None = None) -> PromptSample:
        """The record's question in the evaluation wording, stopping where the model is to answer.

        Args:
            sizes: (width, height) of the images that will be shown, if those are not the record's own.

        Raises:
            BadSample: the record lacks what its task needs, or an image whose size is needed cannot be read.
        """
        turns = TASKS[record.task].turns(record, self.geometry, None)
        seen = self._seen(self.sizes(record.images) if sizes is None else sizes)
        rendered = render(self._place(turns, record), self.config.system, open_ended=True)
        ids, _ = self._tokens(rendered, record, self.slots(len(record.images), seen))
        return PromptSample(ids, record.images, seen)

    def sizes(self, images: Sequence[ImageRef]) -> tuple[Size, ...]:
        """(width, height) of images, from their headers; () where their numbers of tokens do not depend on it.

        Raises:
            BadSample: an image that cannot be read.
        """
        return tuple(image_size(image) for image in images) if self.view_tokens else ()

    def _seen(self, sizes: Sequence[Size]) -> tuple[tuple[bool, ...], ...]:
        if not self.view_tokens:
            return ()
        grid = math.isqrt(len(self.view_tokens) - 1)
        return tuple(seen_views(size, self.image_size, grid) for size in sizes)

    def slots(self, images: int, seen: Sequence[Sequence[bool]]) -> list[int]:
        """How many visual tokens each of so many images has."""
        if not self.view_tokens:
            return [self.tokens_per_image] * images
        return [sum(n if s else 1 for n, s in zip(self.view_tokens, views, strict=True)) for views in seen]

    def _place(self, turns: Sequence[Turn], record: Record) -> Sequence[Turn]:
        """Turns whose `<image>` marks agree with the record's images.

        One image (unless the model wants it inline) stands after BOS and loses its mark, as in the original. Otherwise
        every image needs a mark; where there is none, the marks are put in front of the first question.
        """
        marks = sum(turn.question.count(PLACEHOLDER) for turn in turns)
        images = len(record.images)
        if images == 0 and marks:
            raise BadSample("image_absent", f"{marks} {PLACEHOLDER} but no image")
        if self._leading(record):
            return [Turn(turn.question.replace(PLACEHOLDER, "").strip(), turn.answer) for turn in turns]
        if any(PLACEHOLDER in turn.answer for turn in turns):
            raise BadSample("image_in_answer", f"{PLACEHOLDER} in an answer")
        if marks == 0:
            return [Turn(PLACEHOLDER * images + turns[0].question, turns[0].answer), *turns[1:]]
        if marks != images:
            raise BadSample("image_count", f"{marks} {PLACEHOLDER} for {images} images")
        return turns

    def _leading(self, record: Record) -> bool:
        return not record.images or (len(record.images) == 1 and self.image_position == "after_bos")

    def _tokens(
        self, rendered: Rendered, record: Record, slots: Sequence[int], budget: int | None = None
    ) -> tuple[list[int], list[bool]]:
        """Ids and whether they are targets. Text that cannot be within `budget` tokens is left out: of a million
        characters only the first few thousand need the work."""
        longest = len(rendered.text) if budget is None else budget * self.tokenizer.longest_piece
        ids: list[int] = [self.tokenizer.bos_id]
        supervised = [False]
        if record.images and self._leading(record):
            ids += [IMAGE_SLOT] * slots[0]
            supervised += [False] * slots[0]
            pieces = [rendered.text]
        else:
            pieces = rendered.text.split(PLACEHOLDER) if record.images else [rendered.text]
        start = 0
        for i, piece in enumerate(pieces):
            if i:
                ids += [IMAGE_SLOT] * slots[i - 1]
                supervised += [False] * slots[i - 1]
                start += len(PLACEHOLDER)
            if piece:
                piece_ids, spans = self.tokenizer.encode_with_spans(piece[:longest])
                ids += piece_ids
                supervised += _overlaps(spans, rendered.answers, start)
            start += len(piece)
        return ids, supervised


def _overlaps(spans: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]], offset: int) -> list[bool]:
    """Which tokens are targets: those that hold a character of an answer, also when they began before it.

    Both sequences are in order; `offset` is where the spans' text begins in the answers' text.
    """
    flags = [False] * len(spans)
    for begin, end in answers:
        first = bisect_right(spans, begin - offset, key=itemgetter(1))
        behind = bisect_left(spans, end - offset, key=itemgetter(0))
        flags[first:behind] = [True] * (behind - first)
    return flags


def merge_branches(samples: Sequence[Sample], max_length: int) -> list[Sample]:
    """Samples about the same images, joined into as few as `max_length` tokens allow: a branch for each question.

    Samples whose images do not all stand in what they share (inline, after differing text) come back as they were.
    """
    merged: list[Sample] = []
    for sample in samples:
        joined = _join(merged[-1], sample) if merged else None
        if joined is not None and joined.length <= max_length:
            merged[-1] = joined
        else:
            merged.append(sample)
    return merged


def _join(first: Sample, second: Sample) -> Sample | None:
    """Both samples' branches behind what they begin with, or None where they do not share their images' slots.

    The shared prefix ends before the first supervised token of any branch, so every target keeps its own context.
    """
    branches = [(sample.prefix, branch) for sample in (first, second) for branch in sample.branches]
    chains = [prefix + branch.ids for prefix, branch in branches]
    limit = min(len(prefix) + branch.supervised.index(True) for prefix, branch in branches) - 1
    shared = limit
    for chain in chains[1:]:
        if chain[:shared] != chains[0][:shared]:  # halve, comparing slices: each pair of ids by itself takes long
            shared = bisect_left(range(shared), True, key=lambda n: chain[: n + 1] != chains[0][: n + 1])
    if any(IMAGE_SLOT in chain[shared:] for chain in chains):
        return None
    split = [
        # What leaves the prefix for a branch was never supervised.
        Branch(chain[shared:], ([False] * len(prefix) + branch.supervised)[shared:], branch.task, branch.key)
        for chain, (prefix, branch) in zip(chains, branches, strict=True)
    ]
    return Sample(chains[0][:shared], split, first.images, first.source, first.seen)
