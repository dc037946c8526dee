"""Ask a model every question of a list, and score the answers."""

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
from sphinx_pl.evaluation.answer_log import Answered, Journal
from sphinx_pl.evaluation.choosing import answer
from sphinx_pl.evaluation.metrics import METRICS, last_turn
from sphinx_pl.evaluation.question import Question, asked_task, question_of
from sphinx_pl.generation.generate import GenerationConfig, Prompt
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.collectives import of_all_ranks


@dataclass(frozen=True)
class Prediction:
    """One answered question. `domain` and `topic` come from the record's meta, "" where it has none."""

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
    images: tuple[ImageRef, ...] = ()  # the ones that were shown: another record's when they are shuffled
    benchmark: str = ""  # of an official benchmark
    record: Mapping[str, Any] = field(
        default_factory=dict
    )  # as an entry (`sphinx_pl.data.readers.instruction_json`), for scoring anew

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Prediction:
        """Of what `to_dict` gave, also by way of JSON."""
        return cls(**{**values, "images": tuple(ImageRef.from_dict(image) for image in values["images"])})


Judge = Callable[[Record, str, Coordinates, tuple[ImageRef, ...]], Prediction]
"""(record, answer's text, geometry, images that were shown) -> the scored answer."""


def benchmark_label(key: str) -> str:
    """A benchmark's name as it was configured, which its keys begin with; told apart from a task of the same name."""
    name = key.partition("/")[0]
    return f"{name} (benchmark)" if name in TASKS else name


def domain_of(record: Record) -> str:
    return str(record.meta.get("domain", ""))


def topic_of(record: Record) -> str:
    return str(record.meta.get("topic", ""))


def select(records: Sequence[Record], limit: int | None, seed: int = 0) -> list[Record]:
    """The records that have a score, at most `limit` of each task, domain and topic, drawn with `seed`; order kept.

    The task is `asked_task`, so that what is drawn does not depend on the truth.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        if TASKS[record.task].scorer != "none":
            groups[asked_task(record), domain_of(record), topic_of(record)].append(index)
    chosen: list[int] = []
    rng = random.Random(seed)  # one for all: the same places in every group may all have the same answer
    for group in groups.values():
        chosen += group if limit is None or len(group) <= limit else rng.sample(group, limit)
    return [records[index] for index in sorted(chosen)]


def derangement(count: int, rng: random.Random) -> list[int]:
    """A random permutation without a fixed point (one cycle: Sattolo 1986). [0] for count 1, where there is none."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = rng.randrange(i)
        order[i], order[j] = order[j], order[i]
    return order


def shuffle_images(records: Sequence[Record], seed: int = 0) -> dict[str, tuple[ImageRef, ...]]:
    """Record key -> the images of another record of the same task (`asked_task`) with equally many images.

    Images are permuted, not records: where several questions share an image they share its replacement, so no
    question meets its own image again. Records without an image, or with the only one of their task, are left out:
    against their own answers nothing could be better.
    """
    groups: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        groups[asked_task(record), len(record.images)].append(record)
    rng = random.Random(seed)
    shown = {}
    for group in groups.values():
        distinct = list(dict.fromkeys(record.images for record in group))
        order = derangement(len(distinct), rng)
        replacement = {images: distinct[order[i]] for i, images in enumerate(distinct)}
        if len(distinct) > 1:
            shown.update({record.key: replacement[record.images] for record in group})
    return shown


@dataclass(frozen=True)
class _Asked:
    """A question with its place in the records, its prompt, and how many tokens its answer may have."""

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
    judge: Judge | None = None,
    journal: Journal | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    title: str = "questions",
    skipped: dict[str, int] | None = None,
) -> list[Prediction]:
    """Generate and score an answer to the last question of every record, in the order of `records`.

    `ask` gets the questions without the records. Their true answers are read when all answers are there.

    Args:
        model: on its device.
        generation: how answers are drawn; what ends them, and how long they get, is the processor's and the task's.
        max_new_tokens: instead of the tasks' own.
        ranking: see `sphinx_pl.evaluation.choosing`.
        closed: see `sphinx_pl.evaluation.question.question_of`.
        images: record key -> images to show instead of its own (see `shuffle_images`).
        judge: scores an answer; by default the metric of the record's task does (`judge`).
        journal: what was answered before, and where answers are noted.
        rank: this process among `world_size` that answer a share each; all get all predictions.
        skipped: filled with the number of records that could not be asked, by reason.
    """
    lost: Counter[str] = Counter()
    questions: dict[int, Question] = {}
    for place, record in enumerate(records):
        try:
            question = question_of(record, processor.coordinates, max_new_tokens, closed)
        except SkipSample as error:
            lost[error.reason] += 1
            continue
        # Another record's images are not what this one's coordinates are about.
        questions[place] = question if images is None else dataclasses.replace(question, images=images[record.key])
    answers = ask(
        model,
        processor,
        questions,
        generation=generation or GenerationConfig(),
        batch_size=batch_size,
        ranking=ranking,
        journal=journal,
        rank=rank,
        world_size=world_size,
        progress=progress,
        title=title,
        lost=lost,
    )
    if skipped is not None:
        skipped.update(lost)
    score = judge or _judge
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
    journal: Journal | None,
    rank: int,
    world_size: int,
    progress: bool,
    title: str,
    lost: Counter[str],
) -> dict[int, str]:
    """The answers to questions by their places, in their order; `lost` counts those that could not be asked.

    Which questions share a batch depends on the questions alone, neither on what was answered before nor on the number
    of ranks: answers are the same after a kill, and by several processes.
    """
    asked = _prompts(model, processor, questions, lost)
    batches = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
    done = journal.open(_fingerprint(asked, batch_size, ranking), rank, world_size) if journal and asked else {}
    todo = [number for number in range(rank, len(batches), world_size) if number not in done]
    stop, eos = processor.stop_sequences, processor.tokenizer.eos_id
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress or rank > 0) as bar, ThreadPoolExecutor(1) as pool:
        shown = bar.add_task(title, total=len(asked), completed=sum(len(batches[number]) for number in done))
        # Decoded while the batch before is answered.
        decoding = pool.submit(_decode, batches[todo[0]], processor.image_size) if todo else None
        for number, following in itertools.zip_longest(todo, todo[1:]):
            assert decoding is not None
            prompts, places, missing = decoding.result()
            if following is not None:
                decoding = pool.submit(_decode, batches[following], processor.image_size)
            config = dataclasses.replace(generation, seed=generation.seed + number * batch_size, eos_id=eos, stop=stop)
            texts = answer(model, processor, [questions[place] for place in places], prompts, config, ranking)
            done[number] = Answered(dict(zip(places, texts, strict=True)), missing)
            if journal:
                journal.note(number, done[number])
            bar.advance(shown, len(batches[number]) * world_size)
    if journal:
        journal.close()
    answers: dict[int, str] = {}
    for answered in ChainMap(*of_all_ranks(done, world_size)).values():
        answers |= answered.texts
        lost.update(answered.lost)
    return dict(sorted(answers.items()))


def _prompts(
    model: Sphinx, processor: Processor, questions: Mapping[int, Question], lost: Counter[str]
) -> list[_Asked]:
    """Sorted, so that similar lengths share a batch: little padding, and no short answer waits for a long one."""
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
        asked.append(_Asked(place, question, prompt, min(question.limit, room)))
    return sorted(asked, key=lambda one: (one.limit, len(one.prompt.ids)))


def _fingerprint(asked: Sequence[_Asked], batch_size: int, ranking: bool) -> str:
    """Of what is asked: prompts in their order, with the images' places and the answers' longest lengths; of a choice
    by likelihood also what is to choose from."""
    digest = hashlib.sha256(f"{batch_size} {len(asked)}".encode())
    for one in asked:
        images = [(image.path, image.offset, image.crop, image.flip) for image in one.question.images]
        candidates = f" {one.question.candidates}" if ranking else ""
        digest.update(f"{one.place} {one.limit} {images}{candidates}".encode("utf-8", "surrogateescape"))
        digest.update(np.asarray(one.prompt.ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _decode(batch: Sequence[_Asked], size: int) -> tuple[list[Prompt], list[int], dict[str, int]]:
    """Prompts with pixels, their records' places, and how many have an image that cannot be read, by reason."""
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


def judge(record: Record, prediction: str, coordinates: Coordinates, images: tuple[ImageRef, ...] = ()) -> Prediction:
    """Score an answer's text with the metric of the record's task."""
    metric = METRICS[TASKS[record.task].scorer]
    turn = last_turn(record, coordinates)
    return Prediction(
        key=record.key,
        task=record.task,
        domain=domain_of(record),
        topic=topic_of(record),
        metric=metric.name,
        question=turn.question,
        answer=turn.answer,
        prediction=prediction,
        score=metric.score(prediction, record, coordinates),
        parsed=metric.parsed(prediction, record),
        images=images,
        record=to_entry(record),
    )


_judge = judge  # a parameter has the name
