"""Records -> token ids, for training and for prompts. A model is saved with its processor: it needs
this format."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Optional

from sphinx_pl.data.coordinates import Coordinates, Size, kept_views
from sphinx_pl.data.images import annotated_images, image_size
from sphinx_pl.data.prompt_formats import (
    SPHINX,
    PromptFormat,
    Rendered,
    default_system,
    format_names,
    is_document,
    prompt_format,
)
from sphinx_pl.data.schema import IMAGE_SLOT, PLACEHOLDER, ImageRef, Record, Sample, SampleQuestion, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.data.tokenizers import Tokenizer, load_tokenizer
from sphinx_pl.utils.config import build, within
from sphinx_pl.utils.errors import UserError, suggest

TEXT_LENGTH = 2048
"""Tokens of a text in the recipe, and of a sample unless its image takes nearly all of them."""
BEHIND_IMAGE = 512
"""Tokens of text for which a sample with one image has room, at least."""


@dataclass
class ProcessorConfig:
    """The section `data.processor`: prompt format, system text, decimals of coordinates, and the
    longest sample in tokens.

    `system` None is the format's own system text.
    `max_length` None follows from the model: `TEXT_LENGTH` tokens, or one image and `BEHIND_IMAGE`
    if that is more. `on_too_long` decides about longer conversations. `cut` ends one after the last
    whole part of an answer, and `skip` skips it.
    """

    system: Optional[str] = None
    decimals: int = within(3, at_least=1, at_most=6)
    max_length: Optional[int] = within(None, at_least=2, at_most=2**24)  # a text begins with BOS
    on_too_long: str = "cut"
    prompt_format: str = "sphinx"

    def __post_init__(self) -> None:
        if self.prompt_format not in (names := format_names()):
            raise UserError(
                f"data.processor.prompt_format='{self.prompt_format}': {suggest(self.prompt_format, names)}"
            )
        if self.system is None:
            self.system = default_system(self.prompt_format)
        if self.on_too_long not in (known := ("cut", "skip")):
            raise UserError(f"data.processor.on_too_long='{self.on_too_long}': {suggest(self.on_too_long, known)}")
        if PLACEHOLDER in self.system:
            raise UserError(f"data.processor.system holds {PLACEHOLDER}, which only a question can: remove it")


@dataclass(frozen=True, slots=True)
class PromptSample:
    """The ids of a prompt (IMAGE_SLOT for each visual token) and the images that fill the slots."""

    ids: list[int]
    images: tuple[ImageRef, ...]
    kept_views: tuple[tuple[bool, ...], ...] = ()  # see `Sample`


@dataclass
class Processor:
    """Writes records as token ids: it owns the tokenizer, the prompt format and the text form of
    coordinates. The format's control tokens are added to the tokenizer, if it lacks them.

    `tokens_per_image` and `image_size` belong to the model. The caller gives them, since data does
    not import models. `view_tokens` are the tokens of each view; () if the model does not skip
    views that show only padding.
    """

    config: ProcessorConfig
    tokenizer: Tokenizer
    tokens_per_image: int
    image_size: int
    image_position: str = "after_bos"
    view_tokens: tuple[int, ...] = ()
    coordinates: Coordinates = field(init=False)
    format: PromptFormat = field(init=False)

    def __post_init__(self) -> None:
        self.format = prompt_format(self.config.prompt_format, self.tokenizer)
        self.format.check(self.config.system or "")
        self.tokenizer = self.tokenizer.with_controls(self.format.controls)
        self.coordinates = Coordinates(decimals=self.config.decimals)
        if self.config.max_length is None:
            length = max(TEXT_LENGTH, self.tokens_per_image + BEHIND_IMAGE)
            self.config = dataclasses.replace(self.config, max_length=length)

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest sample."""
        assert self.config.max_length is not None
        return self.config.max_length

    def _begin(self, document: bool) -> list[int]:
        """The id at the beginning of a sample: BOS, where the format has it.

        Without BOS a document begins with the end of the text before it, as models of this kind are
        pretrained.
        """
        if self.format.bos and self.tokenizer.bos_id is not None:
            return [self.tokenizer.bos_id]
        return [self.tokenizer.eos_id] if document else []

    def to_dict(self) -> dict[str, Any]:
        """The configuration; the original's format is not named, as in older checkpoints."""
        values = dataclasses.asdict(self.config)
        if values["prompt_format"] == SPHINX.name:
            del values["prompt_format"]
        return values

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], tokenizer_file: str | Path, model: Any, grows: bool = False
    ) -> Processor:
        """The processor of `to_dict()`'s mapping, a tokenizer's file or folder, and a model config
        (only image sizes are read of it).

        Args:
            grows: whether the model's vocabulary grows by the control tokens that the tokenizer
                lacks.

        Raises:
            UserError: the tokenizer has more pieces than the model's vocabulary, lacks what the
                prompt format needs, or does not tell the line break that ends a turn from a space.
        """
        config = build(ProcessorConfig, values, "data.processor")
        processor = cls(
            config,
            load_tokenizer(tokenizer_file),
            tokens_per_image=model.tokens_per_image,
            image_size=model.vision.image_size if model.vision else 0,
            image_position=model.image_position,
            view_tokens=tuple(model.vision.view_tokens) if model.vision and model.vision.skip_padding else (),
        )
        tokenizer, end = processor.tokenizer, processor.format.end
        size = tokenizer.vocab_size
        if (size - len(tokenizer.new_tokens) if grows else size) > model.decoder.vocab_size:
            new = ", ".join(tokenizer.new_tokens)
            raise UserError(
                f"tokenizer {tokenizer.path} has {size} pieces{new and f' with the new {new}'} but "
                f"model.decoder.vocab_size is {model.decoder.vocab_size}: use the tokenizer that the model was made "
                f"for, or set model.decoder.vocab_size={size}"
            )
        if processor.format.ends_in_text and tokenizer.encode(f"a{end}") == tokenizer.encode(f"a {end.lstrip()}"):
            raise UserError(
                f"tokenizer {tokenizer.path} writes a line break as a space, so that ' {end.lstrip()}' in a text has "
                f"the ids of a turn's end and answers keep a '{end.lstrip()}' at their end: use the tokenizer that the "
                "model was made for, or train one with normalization_rule_name=identity, as LLaMA's is"
            )
        return processor

    @property
    def stop_sequences(self) -> list[list[int]]:
        """The ids that end an answer, beside `eos_id`: the format's end of a turn and the
        tokenizer's other ends of a text.

        An end that is text, such as `\\n###`, is there as it is tokenized after a word, at a start
        and after blanks.
        """
        sequences = [[id] for id in self.tokenizer.eos_ids[1:]]
        end = self.format.end
        if not self.format.ends_in_text:
            ids, _ = self.tokenizer.encode_with_spans(end, [(0, len(end))])
            last = ids[-1:]
            return sequences if last in ([self.tokenizer.eos_id], *sequences) else [last, *sequences]
        for before in ("a", "", "a ", "a\n", "a\r"):
            ids, spans = self.tokenizer.encode_with_spans(before + end)
            stop = ids[bisect_right(spans, len(before), key=itemgetter(1)) :]
            if stop not in sequences:
                sequences.append(stop)
        return sequences

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids up to the end of the turn."""
        return self.until_end(self.tokenizer.decode(ids)).strip()

    def until_end(self, text: str) -> str:
        """The model's text up to an end of the turn that is text, as somebody would write it."""
        return self.format.unescape(text.split(self.format.end)[0] if self.format.ends_in_text else text)

    def encode_answer(self, answer: str) -> list[int]:
        """The ids of an answer as in training, without the end of its turn.

        Raises:
            SkipSample: the prompt format cannot write it.
        """
        if not answer.strip():
            return []
        rendered = self.format.render([Turn("a", answer.strip())], "")
        [(begin, _)], [(_, end)] = rendered.answers, rendered.contents
        ids, spans = self.tokenizer.encode_with_spans(rendered.text[:end], rendered.structure, self.format.begins)
        return ids[bisect_right(spans, begin, key=itemgetter(1)) :]

    def sample(self, record: Record, source: str, rng: random.Random | None = None) -> Sample:
        """One record as a sample with one question of at most `max_length` tokens.

        A longer conversation ends after the last whole part of an answer (`Task.parts`), without an
        end of turn if the answer would continue. It has the event `cut`; `cut_targets` and
        `cut_turns` count what is lost.

        Raises:
            SkipSample: the record lacks what its task needs, or `max_length` tokens hold no answer
                or not every image.
        """
        return self.samples(record, source, rng)[0]

    def samples(self, record: Record, source: str, rng: random.Random | None = None) -> list[Sample]:
        """The samples of a record, as `sample` makes them. The rest of a long plain document makes
        further samples.

        Raises:
            SkipSample: as `sample`.
        """
        budget = self.max_length
        if len(record.images) > budget:  # checked before each image is opened for its size
            raise SkipSample("too_long", f"{len(record.images)} images in {budget} tokens")
        turns = TASKS[record.task].turns(record, self.coordinates, rng)
        document = is_document(turns)
        images = annotated_images(record)
        kept_views = self._kept_views(self.sizes(images))
        slots = self.slots(len(images), kept_views)
        rest: list[int] = []
        rendered, events = self._rendered(turns, record)
        if not document:
            ids, spans = self._tokens(rendered, record, slots, document, budget)
            supervised = _overlaps(spans, rendered.answers)
            if len(ids) > budget:
                length, turns_kept = self._cut(rendered, spans, TASKS[record.task].parts)
                events.update(cut=1, cut_turns=len(turns) - turns_kept, cut_targets=sum(supervised[length:]))
                # The end of a text that is much too long was not even tokenized.
                tokenized = spans[-1][1]
                left = (rendered.text[max(begin, tokenized) : end] for begin, end in rendered.answers)
                events["cut_targets"] += sum(len(self.tokenizer.encode(text)) for text in left if text)
                ids, supervised = ids[:length], supervised[:length]
        else:
            if record.images:
                ids, spans = self._tokens(rendered, record, slots, document)
                supervised = _overlaps(spans, rendered.answers)
            else:  # all of a text is supervised: spans would take a hundred times the bytes of a book
                ids = [*self._begin(document), *self.tokenizer.encode(rendered.text)]
                supervised = [False] + [True] * (len(ids) - 1)
            # A plain document also teaches where a text ends.
            ids, supervised = [*ids, self.tokenizer.eos_id], [*supervised, True]
            rest = ids[budget:]
            ids, supervised = ids[:budget], supervised[:budget]
        if not any(supervised):
            raise SkipSample("too_long", f"no answer within {budget} tokens")
        if ids.count(IMAGE_SLOT) < sum(slots):
            raise SkipSample("too_long", f"an image is not within {budget} tokens")
        # A prefix that questions share ends before the first supervised token, at most.
        question = SampleQuestion(ids, supervised, record.task, record.key)
        samples = [Sample([], [question], images, source, kept_views, +(events + Counter(record.events)))]
        for number, start in enumerate(range(0, len(rest), budget - 1), start=2):
            part = [*self._begin(document), *rest[start : start + budget - 1]]
            question = SampleQuestion(part, [False] + [True] * (len(part) - 1), record.task, f"{record.key}#{number}")
            samples.append(Sample([], [question], (), source))
        return samples

    def prompt(self, record: Record, sizes: Sequence[Size] | None = None) -> PromptSample:
        """The record's question in the wording of evaluation, up to the place of the answer.

        Args:
            sizes: (width, height) of the images that will be shown, if they are not the record's
                own.

        Raises:
            SkipSample: the record lacks what its task needs, or an image whose size is needed
                cannot be read.
        """
        turns = TASKS[record.task].turns(record, self.coordinates, None)
        images = annotated_images(record)
        kept_views = self._kept_views(self.sizes(images) if sizes is None else sizes)
        rendered, _ = self._rendered(turns, record, open_ended=True)
        ids, _ = self._tokens(rendered, record, self.slots(len(record.images), kept_views), is_document(turns))
        return PromptSample(ids, images, kept_views)

    def sizes(self, images: Sequence[ImageRef]) -> tuple[Size, ...]:
        """(width, height) of images, from their headers; () if the number of tokens does not depend
        on it.

        Raises:
            SkipSample: an image cannot be read.
        """
        return tuple(image_size(image) for image in images) if self.view_tokens else ()

    def _kept_views(self, sizes: Sequence[Size]) -> tuple[tuple[bool, ...], ...]:
        if not self.view_tokens:
            return ()
        grid = math.isqrt(len(self.view_tokens) - 1)
        return tuple(kept_views(size, self.image_size, grid) for size in sizes)

    def slots(self, images: int, kept_views: Sequence[Sequence[bool]]) -> list[int]:
        """The number of visual tokens of each of `images` images."""
        if not self.view_tokens:
            return [self.tokens_per_image] * images
        return [sum(n if s else 1 for n, s in zip(self.view_tokens, views, strict=True)) for views in kept_views]

    def _rendered(
        self, turns: Sequence[Turn], record: Record, open_ended: bool = False
    ) -> tuple[Rendered, Counter[str]]:
        """The record's text, and the event `escaped` if a text in it would have become structure."""
        system = (self.config.system or "") if record.system is None else self.format.escape(record.system)
        rendered = self.format.render(self._place(turns, record), system, open_ended, is_document(turns))
        return rendered, Counter(escaped=int(rendered.escaped or record.system not in (None, system)))

    def _place(self, turns: Sequence[Turn], record: Record) -> Sequence[Turn]:
        """The turns with `<image>` marks that agree with the record's images.

        One image (unless the model wants it inline) stands after BOS and loses its mark, as in the
        original. Otherwise every image needs a mark. If there is none, the marks are put in front
        of the first question.
        """
        marks = sum(turn.question.count(PLACEHOLDER) for turn in turns)
        images = len(record.images)
        if images == 0 and marks:
            raise SkipSample("image_absent", f"{record.key}: {marks} {PLACEHOLDER} but no image")
        if marks not in (0, images):
            raise SkipSample("image_count", f"{record.key}: {marks} {PLACEHOLDER} for {images} images")
        if PLACEHOLDER in (record.system or ""):
            raise SkipSample("image_in_system", f"{record.key}: {PLACEHOLDER} in the system text")
        if self._leading(record):
            return [Turn(turn.question.replace(PLACEHOLDER, "").strip(), turn.answer) for turn in turns]
        if any(PLACEHOLDER in turn.answer for turn in turns):
            raise SkipSample("image_in_answer", f"{record.key}: {PLACEHOLDER} in an answer")
        if marks == 0:
            return [Turn(PLACEHOLDER * images + turns[0].question, turns[0].answer), *turns[1:]]
        return turns

    def _cut(self, rendered: Rendered, spans: Sequence[tuple[int, int]], parts: re.Pattern[str]) -> tuple[int, int]:
        """The number of tokens and of turns that are kept of a conversation with more than
        `max_length` tokens.

        What is kept ends with a whole turn, or within an answer behind a whole part that `parts`
        finds.

        Raises:
            SkipSample: too_long, if nothing of an answer would be left or the configuration wants
                no cut.
        """
        budget = self.max_length
        if self.config.on_too_long == "skip":
            raise SkipSample("too_long", f"more than {budget} tokens")
        limit = min(spans[budget - 1][1], spans[budget][0])  # a character can be several tokens
        text, turn = rendered.text, bisect_right(rendered.answers, limit, key=itemgetter(1))
        begin, _ = rendered.answers[turn]
        first, last = rendered.contents[turn]
        spans_of_parts = (match.span() for match in parts.finditer(text, first, last))
        whole = list(itertools.takewhile(lambda part: part[0] < limit, spans_of_parts))
        limit = min(limit, last)
        while limit > begin:
            number = bisect_left(whole, limit, key=itemgetter(1))
            if number < len(whole) and whole[number][0] < limit < whole[number][1]:
                limit = whole[number][0]
            length = bisect_right(spans, limit, key=itemgetter(1))
            reached = spans[length - 1][1]
            if not text[reached:limit].strip():
                if text[begin:limit].strip():
                    return length, turn + 1
                break
            limit = reached  # a token goes beyond the part's end
        if not turn:
            raise SkipSample("too_long", f"no whole part of an answer within {budget} tokens")
        return bisect_right(spans, rendered.answers[turn - 1][1], key=itemgetter(1)), turn

    def _leading(self, record: Record) -> bool:
        return not record.images or (len(record.images) == 1 and self.image_position == "after_bos")

    def _tokens(
        self, rendered: Rendered, record: Record, slots: Sequence[int], document: bool, budget: int | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each id the half-open range of characters of the text that it stands
        for.

        The range is empty for BOS and images. Text that cannot be within `budget` tokens is not
        tokenized: of a million characters only the first few thousand need the work.
        """
        longest = len(rendered.text) if budget is None else budget * self.tokenizer.longest_piece
        ids = self._begin(document)
        spans = [(0, 0)] * len(ids)
        if record.images and self._leading(record):
            ids += [IMAGE_SLOT] * slots[0]
            spans += [(0, 0)] * slots[0]
            pieces = [rendered.text]
        else:
            pieces = rendered.text.split(PLACEHOLDER) if record.images else [rendered.text]
        start = 0
        for i, piece in enumerate(pieces):
            if budget is not None and len(ids) > budget:
                break
            if i:
                start += len(PLACEHOLDER)
                ids += [IMAGE_SLOT] * slots[i - 1]
                spans += [(start, start)] * slots[i - 1]
            if piece:
                piece_ids, piece_spans = self.tokenizer.encode_with_spans(
                    piece[:longest],
                    _within(rendered.structure, start, piece[:longest]),
                    self.format.begins and not start,
                )
                ids += piece_ids
                spans += [(begin + start, end + start) for begin, end in piece_spans]
            start += len(piece)
        return ids, spans


def _within(ranges: Sequence[tuple[int, int]], start: int, text: str) -> list[tuple[int, int]]:
    """The parts of ranges of characters that lie within `text`, which begins at `start`."""
    end = start + len(text)
    return [(max(a, start) - start, min(b, end) - start) for a, b in ranges if a < end and b > start]


def _overlaps(spans: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token is a target: it holds a character of an answer, even if it begins before
    the answer.

    Both sequences are in order.
    """
    flags = [False] * len(spans)
    for begin, end in answers:
        first = bisect_right(spans, begin, key=itemgetter(1))
        behind = bisect_left(spans, end, key=itemgetter(0))
        flags[first:behind] = [True] * (behind - first)
    return flags


def merge_questions(samples: Sequence[Sample], max_length: int) -> list[Sample]:
    """Samples about the same images, joined into as few samples as `max_length` tokens allow.

    Samples are left as they are if their images are not all in the text that they share (inline
    images after differing text), or if the images are not shown in the same way.
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
    """Both samples' questions behind the prefix that they share, or None if they do not share their
    images' slots.

    The shared prefix ends before the first supervised token of any question, so every target keeps
    its own context.
    """
    images = _shared_images(first.images, second.images)
    if images is None or first.kept_views != second.kept_views:
        return None
    questions = [(sample.prefix, question) for sample in (first, second) for question in sample.questions]
    chains = [prefix + question.ids for prefix, question in questions]
    limit = min(len(prefix) + question.supervised.index(True) for prefix, question in questions) - 1
    shared = limit
    for chain in chains[1:]:
        if chain[:shared] != chains[0][:shared]:  # bisection over slices is faster than comparing ids one by one
            shared = bisect_left(range(shared), True, key=lambda n: chain[: n + 1] != chains[0][: n + 1])
    if any(IMAGE_SLOT in chain[shared:] for chain in chains):
        return None
    split = [
        # Tokens that leave the prefix for a question were never supervised.
        SampleQuestion(
            chain[shared:], ([False] * len(prefix) + question.supervised)[shared:], question.task, question.key
        )
        for chain, (prefix, question) in zip(chains, questions, strict=True)
    ]
    events = Counter(first.events) + Counter(second.events)
    return Sample(chains[0][:shared], split, images, first.source, first.kept_views, events)


def _shared_images(first: Sequence[ImageRef], second: Sequence[ImageRef]) -> tuple[ImageRef, ...] | None:
    """The images that both samples show, None if they differ.

    If only one of them has an annotated size, it holds for both.
    """
    if first != second or any(
        a.annotated and b.annotated not in (None, a.annotated) for a, b in zip(first, second, strict=True)
    ):
        return None
    return tuple(a if a.annotated else b for a, b in zip(first, second, strict=True))
