"""The evaluation of records: a model answers their questions, and scorers score the answers."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor, PromptSample
from sphinx_pl.data.readers.instruction_json import to_entry
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.answer_log import AnsweredBatch, AnswerLog
from sphinx_pl.evaluation.question import Question, asked_task, question_of
from sphinx_pl.evaluation.scorers.tasks import last_turn, scorer_of
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate
from sphinx_pl.generation.loglikelihood import choice_loglikelihoods
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.collectives import of_all_ranks


@dataclass(frozen=True)
class Prediction:
    """One answered question with its score, as predictions.jsonl holds it.

    Attributes:
        domain, topic: from the record's meta, "" where it has none.
        metric: the task's scorer, or the benchmark's main metric.
        images: the images that the model saw, which are another record's when they are shuffled.
        benchmark: the kind of the official benchmark, "" for a test source.
        record: the record as an entry (`sphinx_pl.data.readers.instruction_json`), so that it can
            be scored again.
    """

    key: str
    task: str
    domain: str
    topic: str
    metric: str
    question: str
    answer: str
    prediction: str
    score: float
    parsed: bool
    images: tuple[ImageRef, ...] = ()
    benchmark: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Prediction:
        """The prediction that `to_dict` wrote, directly or through JSON."""
        return cls(**{**values, "images": tuple(ImageRef.from_dict(image) for image in values["images"])})


ScoreAnswer = Callable[[Record, str, Coordinates, tuple[ImageRef, ...]], Prediction]
"""(record, answer's text, geometry, images that the model saw) -> the answer with its score."""


def benchmark_label(key: str) -> str:
    """The configured name of a benchmark, which its keys begin with. It differs from a task of the
    same name."""
    name = key.partition("/")[0]
    return f"{name} (benchmark)" if name in TASKS else name


def domain_of(record: Record) -> str:
    return str(record.meta.get("domain", ""))


def topic_of(record: Record) -> str:
    return str(record.meta.get("topic", ""))


def select(records: Sequence[Record], limit: int | None, seed: int = 0) -> list[Record]:
    """The records that have a score, at most `limit` of each task, domain and topic, drawn with
    `seed`, in their order.

    The task is `asked_task`, so that the draw does not depend on the truth.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        if TASKS[record.task].scorer != "none":
            groups[asked_task(record), domain_of(record), topic_of(record)].append(index)
    chosen: list[int] = []
    rng = random.Random(seed)  # one generator for all groups: the same places in each may have the same answer
    for group in groups.values():
        chosen += group if limit is None or len(group) <= limit else rng.sample(group, limit)
    return [records[index] for index in sorted(chosen)]


def derangement(count: int, rng: random.Random) -> list[int]:
    """A random permutation without a fixed point (one cycle: Sattolo 1986). [0] for count 1, where
    there is none."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = rng.randrange(i)
        order[i], order[j] = order[j], order[i]
    return order


def shuffle_images(records: Sequence[Record], seed: int = 0) -> dict[str, tuple[ImageRef, ...]]:
    """Record key -> the images of another record of the same task (`asked_task`) with equally many
    images.

    Images are permuted, not records: where several questions share an image they share its
    replacement, so no question meets its own image again. Records without an image, or with the
    only one of their task, are skipped: they would only meet their own.
    """
    groups: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        groups[asked_task(record), len(record.images)].append(record)
    rng = random.Random(seed)
    replacements = {}
    for group in groups.values():
        distinct = list(dict.fromkeys(record.images for record in group))
        order = derangement(len(distinct), rng)
        replacement = {images: distinct[order[i]] for i, images in enumerate(distinct)}
        if len(distinct) > 1:
            replacements.update({record.key: replacement[record.images] for record in group})
    return replacements


@dataclass(frozen=True)
class _PlacedPrompt:
    """A question with its place in the records, its prompt, and the longest answer in tokens."""

    place: int
    question: Question
    prompt: PromptSample
    limit: int


def evaluate(
    model: Sphinx,
    processor: Processor,
    records: Sequence[Record],
    *,
    generation: GenerationConfig | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    ranking: bool = False,
    closed: Sequence[str] | None = None,
    images: Mapping[str, tuple[ImageRef, ...]] | None = None,
    score_answer: ScoreAnswer | None = None,
    answer_log: AnswerLog | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    title: str = "questions",
    skipped: dict[str, int] | None = None,
) -> list[Prediction]:
    """The scored answers to the last question of every record, in the order of `records`.

    `ask` gets the questions without the records. The true answers are read when all answers are
    complete.

    Args:
        model: on its device.
        generation: how answers are drawn. The processor has their stop sequences, the task their
            longest length.
        max_new_tokens: the longest answer, instead of the tasks' own.
        ranking: see `answer`.
        closed: see `sphinx_pl.evaluation.question.question_of`.
        images: record key -> images to show instead of its own (see `shuffle_images`).
        score_answer: scores an answer; by default the scorer of the record's task does
            (`score_answer`).
        answer_log: holds earlier answers and stores new ones.
        rank: this process among `world_size`. Each answers a share, and all get all predictions.
        skipped: gets the number of records that could not be asked, by reason.
    """
    lost: Counter[str] = Counter()
    questions: dict[int, Question] = {}
    for place, record in enumerate(records):
        try:
            question = question_of(record, processor.coordinates, max_new_tokens, closed)
        except SkipSample as error:
            lost[error.reason] += 1
            continue
        # The images are replaced after the question is written: its coordinates belong to the
        # record's own images.
        questions[place] = question if images is None else dataclasses.replace(question, images=images[record.key])
    answers = ask(
        model,
        processor,
        questions,
        generation=generation or GenerationConfig(),
        batch_size=batch_size,
        ranking=ranking,
        answer_log=answer_log,
        rank=rank,
        world_size=world_size,
        progress=progress,
        title=title,
        lost=lost,
    )
    if skipped is not None:
        skipped.update(lost)
    score = score_answer or _score_answer
    return [
        score(records[place], text, processor.coordinates, questions[place].images) for place, text in answers.items()
    ]


def ask(
    model: Sphinx,
    processor: Processor,
    questions: Mapping[int, Question],
    *,
    generation: GenerationConfig,
    batch_size: int,
    ranking: bool,
    answer_log: AnswerLog | None,
    rank: int,
    world_size: int,
    progress: bool,
    title: str,
    lost: Counter[str],
) -> dict[int, str]:
    """The answers to questions by their places, in their order; `lost` counts the questions that
    could not be asked.

    The batches depend on the questions alone, neither on earlier answers nor on the number of
    ranks. So answers are the same after a kill, and with several processes.
    """
    asked = _prompts(model, processor, questions, lost)
    batches = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
    done = answer_log.open(_fingerprint(asked, batch_size, ranking), rank, world_size) if answer_log and asked else {}
    todo = [number for number in range(rank, len(batches), world_size) if number not in done]
    stop, eos = processor.stop_sequences, processor.tokenizer.eos_id
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress or rank > 0) as bar, ThreadPoolExecutor(1) as pool:
        task = bar.add_task(title, total=len(asked), completed=sum(len(batches[number]) for number in done))
        # A batch is decoded while the model answers the one before.
        decoding = pool.submit(_decode, batches[todo[0]], processor.image_size) if todo else None
        for number, following in itertools.zip_longest(todo, todo[1:]):
            assert decoding is not None
            prompts, places, missing = decoding.result()
            if following is not None:
                decoding = pool.submit(_decode, batches[following], processor.image_size)
            config = dataclasses.replace(generation, seed=generation.seed + number * batch_size, eos_id=eos, stop=stop)
            texts = answer(model, processor, [questions[place] for place in places], prompts, config, ranking)
            done[number] = AnsweredBatch(dict(zip(places, texts, strict=True)), missing)
            if answer_log:
                answer_log.append(number, done[number])
            bar.advance(task, len(batches[number]) * world_size)
    if answer_log:
        answer_log.close()
    answers: dict[int, str] = {}
    for batch in ChainMap(*of_all_ranks(done, world_size)).values():
        answers |= batch.texts
        lost.update(batch.lost)
    return dict(sorted(answers.items()))


def answer(
    model: Sphinx,
    processor: Processor,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    ranking: bool = False,
) -> list[str]:
    """The text of each answer: generated, or the likeliest candidate where the possible answers are
    known.

    Args:
        prompts: the questions' ids and pixels.
        ranking: choose the candidate whose tokens are together the most probable, where a question
            has candidates.
    """
    candidates: list[tuple[str, ...]] = []
    tokens: list[list[list[int]]] = []
    for question, prompt in zip(questions, prompts, strict=True):
        choices = question.candidates if ranking else ()
        ids = [processor.encode_answer(choice) for choice in choices]
        fit = max(map(len, ids), default=0) <= (prompt.max_new_tokens or config.max_new_tokens)
        candidates.append(choices if fit else ())
        tokens.append(ids)
    closed = [number for number, choices in enumerate(candidates) if choices]
    texts: dict[int, str] = {}
    scores = choice_loglikelihoods(model, [prompts[number] for number in closed], [tokens[number] for number in closed])
    for number, each in zip(closed, scores, strict=True):
        texts[number] = candidates[number][each.index(max(each))]
    generated = [number for number in range(len(questions)) if number not in texts]
    answers = generate(model, [prompts[number] for number in generated], config)
    texts |= {number: processor.decode(ids) for number, ids in zip(generated, answers, strict=True)}
    return [texts[number] for number in range(len(questions))]


def _prompts(
    model: Sphinx, processor: Processor, questions: Mapping[int, Question], lost: Counter[str]
) -> list[_PlacedPrompt]:
    """The prompts, sorted so that similar lengths share a batch: little padding, and no answer
    waits for a longer one."""
    asked = []
    for place, question in questions.items():
        try:
            prompt = question.prompt(processor)
        except SkipSample as error:
            lost[error.reason] += 1
            continue
        room = model.config.decoder.max_positions - len(prompt.ids)
        if room < 1:
            lost["prompt_too_long"] += 1
            continue
        asked.append(_PlacedPrompt(place, question, prompt, min(question.limit, room)))
    return sorted(asked, key=lambda one: (one.limit, len(one.prompt.ids)))


def _fingerprint(asked: Sequence[_PlacedPrompt], batch_size: int, ranking: bool) -> str:
    """A hash of the prompts in their order, with the images' places, the longest answers and the
    candidates of a choice."""
    digest = hashlib.sha256(f"{batch_size} {len(asked)}".encode())
    for one in asked:
        images = [(image.path, image.offset, image.crop, image.flip) for image in one.question.images]
        candidates = f" {one.question.candidates}" if ranking else ""
        digest.update(f"{one.place} {one.limit} {images}{candidates}".encode("utf-8", "surrogateescape"))
        digest.update(np.asarray(one.prompt.ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _decode(batch: Sequence[_PlacedPrompt], size: int) -> tuple[list[Prompt], list[int], dict[str, int]]:
    """Prompts with pixels, their records' places, and the number of unreadable images by reason."""
    prompts: list[Prompt] = []
    places: list[int] = []
    lost: Counter[str] = Counter()
    for one in batch:
        try:
            pixels = [load_image(image, size) for image in one.question.images]
        except SkipSample as error:
            lost[error.reason] += 1
            continue
        stacked = torch.stack(pixels) if pixels else None
        prompts.append(Prompt(one.prompt.ids, stacked, one.limit, one.prompt.kept_views))
        places.append(one.place)
    return prompts, places, dict(lost)


def score_answer(
    record: Record, prediction: str, coordinates: Coordinates, images: tuple[ImageRef, ...] = ()
) -> Prediction:
    """The answer with its score by the scorer of the record's task."""
    scorer = scorer_of(record)
    score = scorer(prediction, record, coordinates)
    turn = last_turn(record, coordinates)
    return Prediction(
        key=record.key,
        task=record.task,
        domain=domain_of(record),
        topic=topic_of(record),
        metric=scorer.name,
        question=turn.question,
        answer=turn.answer,
        prediction=prediction,
        score=score.value,
        parsed=score.parsed,
        images=images,
        record=to_entry(record),
    )


_score_answer = score_answer  # a parameter has the name
