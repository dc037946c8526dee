"""The answers to lmms-eval's requests. This module knows their form, their `args`, but does not
import lmms-eval.

| request                    | args                                                                        |
|----------------------------|-----------------------------------------------------------------------------|
| generate_until             | context, generation arguments, doc_to_visual, number, task, split           |
| loglikelihood              | context, continuation, doc_to_visual, number, task, split                   |
| generate_until_multi_round | context, generation arguments, doc_to_visual, doc_to_text, number, task, split |

A document is `documents[task][split][number]`. It is opened with its batch, since opening it
decodes its images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import PurePath
from typing import Any

from PIL import Image
from rich.progress import Progress

from sphinx_pl.data.schema import PLACEHOLDER
from sphinx_pl.evaluation.lmms.prompts import PromptRule, find_rule
from sphinx_pl.generation.assistant import Assistant, BadDialog, Dialog, Picture, open_picture
from sphinx_pl.generation.generate import GenerationConfig, Prompt
from sphinx_pl.utils.errors import UserError, suggest

DEFAULT_LIMIT = 128
"""The longest answer in tokens where a task has no limit."""

PROMPTS = ("sphinx", "benchmark")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

Documents = Mapping[str, Mapping[str, Any]]
Request = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A task's generation arguments that we have. `until`: strings that end an answer."""

    limit: int = DEFAULT_LIMIT
    temperature: float = 0.0
    top_p: float = 1.0
    until: tuple[str, ...] = ()

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> Drawing:
        """As transformers means them: `do_sample: false` is greedy whatever the temperature.

        Raises:
            UserError: beam search.
        """
        if (beams := arguments.get("num_beams") or 1) != 1:
            raise UserError(f"num_beams={beams}: SPHINX-PL has no beam search; use --gen_kwargs num_beams=1")
        until = arguments.get("until") or ()
        limit = arguments.get("max_new_tokens") or arguments.get("max_gen_toks") or DEFAULT_LIMIT
        sample = arguments.get("do_sample")
        temperature = arguments.get("temperature")
        if temperature is None:
            temperature = 1.0 if sample else 0.0
        if sample is False or not temperature:
            temperature, top_p = 0.0, 1.0
        else:
            top_p = arguments.get("top_p") or 1.0
        stops = (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)
        return cls(int(limit), float(temperature), float(top_p), stops)

    def cut(self, text: str) -> str:
        """The text before the first of the stop strings in it."""
        return text[: min((place for stop in self.until if (place := text.find(stop)) >= 0), default=len(text))]


@dataclass(slots=True)
class _Round:
    """A document's question: images and text. `whole`: the answer is given and must fit."""

    context: str
    visuals: Callable[[Any], Any] | None
    number: Any
    task: str
    split: str
    drawing: Drawing
    whole: bool = False


@dataclass(slots=True)
class _Asked:
    """A round's prompt, and the rule that converts its answer."""

    prompt: Prompt
    rule: PromptRule | None
    sizes: tuple[tuple[int, int], ...]


class Answers:
    """Answers requests in batches of similar length, and returns the answers in the order of the
    requests.

    `lost` counts, by task, the requests that could not be asked. Their answer is empty, since
    lmms-eval skips none. `documents` is read when it is needed, since lmms-eval fills it later.
    """

    def __init__(
        self,
        assistant: Assistant,
        documents: Documents,
        batch_size: int = 1,
        prompts: str = "sphinx",
        progress: bool = True,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        if prompts not in PROMPTS:
            raise UserError(f"prompts='{prompts}': {suggest(prompts, PROMPTS)}")
        self.assistant = assistant
        self.documents = documents
        self.batch_size = batch_size
        self.rewrite = prompts == "sphinx"
        self.progress = progress
        self.lost: Counter[str] = Counter()

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """A text for each request, cut at the first of its stop strings."""
        rounds = [
            _Round(context, visuals, number, task, split, Drawing.read(arguments))
            for context, arguments, visuals, number, task, split in requests
        ]
        return self._generate(rounds, "generate_until")

    def generate_until_multi_round(self, requests: Sequence[Request]) -> list[list[str]]:
        """The texts of all rounds of each request, as its task keeps them.

        Every round is a dialog of its own. The context that the task writes holds what it needs of
        earlier rounds.
        """
        texts: list[list[str]] = [[] for _ in requests]
        state: list[Any] = [None] * len(requests)
        rounds = {
            place: _Round(context, visuals, number, task, split, Drawing.read(arguments))
            for place, (context, arguments, visuals, _, number, task, split) in enumerate(requests)
        }
        index = 0
        while rounds:
            index += 1
            answers = self._generate(list(rounds.values()), f"round {index}")
            following = {}
            for (place, asked), answer in zip(rounds.items(), answers, strict=True):
                texts[place].append(answer)
                images, context, ended, kept, state[place] = requests[place][3](
                    self.documents[asked.task][asked.split][asked.number],
                    previous_output=list(texts[place]),
                    round_idx=index,
                    previous_round_info=state[place],
                )
                if kept is not None:
                    texts[place] = list(kept)
                if not ended:
                    following[place] = replace(asked, context=context, visuals=partial(_given, images))
            rounds = following
        return texts

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """The *negative* log-probability (nats) of each request's continuation, and whether it is
        the greedy answer.

        lmms-eval's multiple choice takes the smallest number, since its models return losses.
        """
        likelihoods: list[tuple[float, bool]] = [(float("inf"), False)] * len(requests)
        rounds, answers = [], []
        for context, answer, *where in requests:
            visuals, number, task, split = where or (None, None, "", "")  # an answer by itself, without a question
            if callable(answer):
                answer = answer(self.documents[task][split][number])
            answers.append(str(answer))
            limit = len(self.assistant.encode_answer(answers[-1]))
            rounds.append(_Round(context, visuals, number, task, split, Drawing(limit), whole=True))
        for batch in self._batches(rounds, "loglikelihood"):
            prompts = {place: one.prompt for place in batch if (one := self._asked(rounds[place])) is not None}
            scores = self.assistant.likelihoods(list(prompts.values()), [answers[place] for place in prompts])
            for place, (logprob, greedy) in zip(prompts, scores, strict=True):
                likelihoods[place] = (-logprob, greedy)
        return likelihoods

    def _generate(self, rounds: Sequence[_Round], title: str) -> list[str]:
        texts = [""] * len(rounds)
        for batch in self._batches(rounds, title):
            prompts = {place: one for place in batch if (one := self._asked(rounds[place])) is not None}
            drawing = rounds[batch[0]].drawing
            # Another seed for every batch, or the same question in two of them would have the same
            # answer.
            config = GenerationConfig(temperature=drawing.temperature, top_p=drawing.top_p, seed=batch[0])
            answers = self.assistant.answer([one.prompt for one in prompts.values()], config)
            for (place, one), text in zip(prompts.items(), answers, strict=True):
                texts[place] = rounds[place].drawing.cut(text)
                if one.rule is not None and one.sizes:
                    texts[place] = one.rule.answer(texts[place], one.sizes[0], self.assistant.processor.coordinates)
        return texts

    def _batches(self, rounds: Sequence[_Round], title: str) -> Iterator[list[int]]:
        """The places of requests with the same sampling, those of similar length together."""
        encode = self.assistant.processor.tokenizer.encode
        keys = [
            (one.drawing.temperature, one.drawing.top_p, one.drawing.limit, len(encode(one.context))) for one in rounds
        ]
        order = sorted(range(len(rounds)), key=keys.__getitem__)
        with Progress(disable=not self.progress) as bar:
            task = bar.add_task(title, total=len(rounds))
            for _, group in groupby(order, key=lambda place: keys[place][:2]):
                places = list(group)
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    yield batch
                    bar.advance(task, len(batch))

    def _asked(self, one: _Round) -> _Asked | None:
        """The prompt of a request; None, and a count, where it cannot be asked."""
        doc = self.documents[one.task][one.split][one.number] if one.task else {}
        try:
            pictures = [open_picture(picture) for picture in _pictures(one, doc)]
            sizes = tuple(picture.size for picture in pictures)
            rule = find_rule(one.task) if self.rewrite else None
            question = one.context
            if rule is not None:
                question = rule.question(question, doc, sizes, self.assistant.processor.coordinates)
            if question.count(PLACEHOLDER) != len(pictures):  # then they stand in front
                question = question.replace(PLACEHOLDER, "")
            prompt = self.assistant.prompt(Dialog(question, pictures), one.drawing.limit)
            if one.whole and not 0 < one.drawing.limit == prompt.max_new_tokens:
                raise BadDialog(f"an answer of {one.drawing.limit} tokens, with room for {prompt.max_new_tokens}")
        except BadDialog:
            self.lost[one.task] += 1
            return None
        return _Asked(prompt, rule, sizes)


def _pictures(one: _Round, doc: Any) -> list[Picture]:
    """The pictures of a document.

    Raises:
        UserError: it has a video or a sound.
    """
    visuals = one.visuals(doc) if one.visuals is not None else None
    pictures: list[Picture] = []
    for item in _flat(visuals):
        if isinstance(item, str) and PurePath(item).suffix.lower() not in IMAGE_SUFFIXES:
            raise UserError(f"task '{one.task}' shows {item!r:.80}: SPHINX looks at images only, leave the task out")
        if not isinstance(item, str | Image.Image):
            raise UserError(
                f"task '{one.task}' shows a {type(item).__name__}: SPHINX looks at images only, leave the task out"
            )
        pictures.append(item)
    return pictures


def _given(images: Any, doc: Any) -> Any:
    return images


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple):
        for item in images:
            yield from _flat(item)
    elif images is not None:
        yield images
