"""Ask a model every question of a test set, score the answers, and summarise them with intervals."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.geometry import Geometry
from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor, PromptSample
from sphinx_pl.data.record import ImageRef, Record
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.choosing import answer
from sphinx_pl.evaluation.metrics import METRICS, last_turn
from sphinx_pl.models.generation import GenerationConfig, OperaConfig, Prompt
from sphinx_pl.models.sphinx import Sphinx

RESAMPLES = 2000


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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Row:
    """Scores of one group: a task, or a domain and topic of it ("" = all). `low`, `high`: 95 % interval of `score`."""

    task: str
    domain: str
    topic: str
    metric: str
    score: float
    low: float
    high: float
    n: int
    unparsed: int
    baselines: dict[str, float]

    @property
    def baseline_kind(self) -> str:
        """The name of the best baseline, "" if there is none."""
        return max(self.baselines, key=lambda kind: self.baselines[kind], default="")

    @property
    def baseline(self) -> float | None:
        return self.baselines[self.baseline_kind] if self.baselines else None

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above the best baseline."""
        return self.baseline is not None and self.low > self.baseline

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "baseline": self.baseline,
            "baseline_kind": self.baseline_kind,
            "above": self.above,
        }


def domain_of(record: Record) -> str:
    return str(record.meta.get("domain", ""))


def topic_of(record: Record) -> str:
    return str(record.meta.get("topic", ""))


def select(records: Sequence[Record], limit: int | None, seed: int = 0) -> list[Record]:
    """The records that have a score, at most `limit` of each task, domain and topic, drawn with `seed`; order kept."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        if TASKS[record.task].scorer != "none":
            groups[record.task, domain_of(record), topic_of(record)].append(index)
    chosen: list[int] = []
    for group in groups.values():
        chosen += group if limit is None or len(group) <= limit else random.Random(seed).sample(group, limit)
    return [records[index] for index in sorted(chosen)]


def derangement(count: int, rng: random.Random) -> list[int]:
    """A random permutation without a fixed point (one cycle: Sattolo 1986). [0] for count 1, where there is none."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = rng.randrange(i)
        order[i], order[j] = order[j], order[i]
    return order


def shuffle_images(records: Sequence[Record], seed: int = 0) -> dict[str, tuple[ImageRef, ...]]:
    """Record key -> the images of another record of the same task with equally many images.

    Images are permuted, not records: where several questions share an image they share its replacement, so no
    question meets its own image again. Records without an image, or with the only one of their task, are left out:
    against their own answers nothing could be better.
    """
    groups: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.task, len(record.images)].append(record)
    rng = random.Random(seed)
    shown = {}
    for group in groups.values():
        distinct = list(dict.fromkeys(record.images for record in group))
        order = derangement(len(distinct), rng)
        replacement = {images: distinct[order[i]] for i, images in enumerate(distinct)}
        if len(distinct) > 1:
            shown.update({record.key: replacement[record.images] for record in group})
    return shown


def evaluate(
    model: Sphinx,
    processor: Processor,
    records: Sequence[Record],
    *,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    opera: OperaConfig | None = None,
    ranking: bool = False,
    images: Mapping[str, tuple[ImageRef, ...]] | None = None,
    progress: bool = True,
    title: str = "questions",
    skipped: dict[str, int] | None = None,
) -> list[Prediction]:
    """Generate and score an answer to the last question of every record, in the order of `records`.

    Args:
        model: on its device.
        ranking: see `sphinx_pl.evaluation.choosing`.
        images: record key -> images to show instead of its own (see `shuffle_images`).
        skipped: filled with the number of records that could not be asked, by reason.
    """
    asked: list[tuple[int, PromptSample, int]] = []  # place in `records`, prompt, longest answer in tokens
    lost: dict[str, int] = defaultdict(int)
    for place, record in enumerate(records):
        try:
            prompt = processor.prompt(record, None if images is None else processor.sizes(images[record.key]))
        except BadSample as error:
            lost[error.reason] += 1
            continue
        room = model.config.decoder.max_positions - len(prompt.ids)
        if room < 1:
            lost["prompt_too_long"] += 1
            continue
        asked.append((place, prompt, min(TASKS[record.task].max_new_tokens, room)))
    # Similar lengths share a batch: little padding, and no short answer waits for a long one.
    asked.sort(key=lambda item: (item[2], len(item[1].ids)))
    stop = processor.stop_sequences
    answered: dict[int, Prediction] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress) as bar:
        shown = bar.add_task(title, total=len(asked))
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            prompts: list[Prompt] = []
            places: list[int] = []
            refs: list[tuple[ImageRef, ...]] = []
            for place, prompt, limit in batch:
                own = prompt.images if images is None else images[records[place].key]
                try:
                    pixels = [load_image(image, processor.image_size) for image in own]
                except BadSample as error:
                    lost[error.reason] += 1
                    continue
                prompts.append(Prompt(prompt.ids, torch.stack(pixels) if pixels else None, limit, prompt.seen))
                places.append(place)
                refs.append(own)
            config = GenerationConfig(
                temperature=temperature,
                top_p=top_p,
                seed=seed + start,
                eos_id=processor.tokenizer.eos_id,
                stop=stop,
                num_beams=num_beams,
                length_penalty=length_penalty,
                opera=opera,
            )
            texts = answer(model, processor, [records[place] for place in places], prompts, config, ranking)
            for place, text, own in zip(places, texts, refs, strict=True):
                answered[place] = judge(records[place], text, processor.geometry, own)
            bar.advance(shown, len(batch))
    if skipped is not None:
        skipped.update(lost)
    return [answered[place] for place in sorted(answered)]


def judge(record: Record, prediction: str, geometry: Geometry, images: tuple[ImageRef, ...] = ()) -> Prediction:
    """Score an answer's text with the metric of the record's task."""
    metric = METRICS[TASKS[record.task].scorer]
    turn = last_turn(record, geometry)
    return Prediction(
        key=record.key,
        task=record.task,
        domain=domain_of(record),
        topic=topic_of(record),
        metric=metric.name,
        question=turn.question,
        answer=turn.answer,
        prediction=prediction,
        score=metric.score(prediction, record, geometry),
        parsed=metric.parsed(prediction),
        images=images,
    )


def bootstrap(scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of the mean of `scores`.

    Equal scores are counted together: a resample is then one multinomial draw, the same in distribution and cheap.
    """
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(scores), counts / len(scores), size=resamples)
    low, high = np.quantile(drawn @ values / len(scores), [0.025, 0.975])
    return float(low), float(high)


def summarise(
    predictions: Sequence[Prediction], baselines: Mapping[str, Sequence[Prediction]] | None = None, seed: int = 0
) -> list[Row]:
    """One row per task, followed by one per domain and topic of it where there are several.

    Args:
        baselines: name -> predictions of a baseline on the same records.
    """
    scores = {kind: {other.key: other.score for other in answers} for kind, answers in (baselines or {}).items()}

    def row(group: Sequence[Prediction], task: str, domain: str, topic: str) -> Row:
        own = [prediction.score for prediction in group]
        low, high = bootstrap(own, seed)
        compared = {
            kind: [by_key[prediction.key] for prediction in group if prediction.key in by_key]
            for kind, by_key in scores.items()
        }
        return Row(
            task=task,
            domain=domain,
            topic=topic,
            metric=group[0].metric,
            score=sum(own) / len(own),
            low=low,
            high=high,
            n=len(own),
            unparsed=sum(not prediction.parsed for prediction in group),
            baselines={kind: sum(values) / len(values) for kind, values in compared.items() if values},
        )

    rows = []
    tasks: dict[str, dict[tuple[str, str], list[Prediction]]] = defaultdict(lambda: defaultdict(list))
    for prediction in predictions:
        tasks[prediction.task][prediction.topic, prediction.domain].append(prediction)
    for task, groups in tasks.items():
        rows.append(row([prediction for group in groups.values() for prediction in group], task, "", ""))
        if len(groups) > 1:
            rows += [row(groups[topic, domain], task, domain, topic) for topic, domain in sorted(groups)]
    return rows
