"""The constant baseline: the best constant answer of each group, chosen on training records."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.question import asked_task
from sphinx_pl.evaluation.runner import Prediction, score_answer, topic_of
from sphinx_pl.evaluation.scorers.tasks import last_turn, scorer_of

CANDIDATES = 50
SAMPLE = 500

GroupKey = tuple[str, str]
"""Task (`asked_task`) and topic, which the question tells, so a constant may depend on them."""


def fit_constants(
    records: Iterable[Record],
    coordinates: Coordinates,
    candidates: int = CANDIDATES,
    sample: int = SAMPLE,
    seed: int = 0,
) -> dict[GroupKey, str]:
    """The constant answer with the best mean score in training: of each task and topic, and of each
    task (topic "").

    Candidates are the `candidates` most frequent answers and, where answers have geometry, the mean
    one. Each is scored on at most `sample` records, drawn with `seed`. Records that their task
    cannot use are skipped, and so are topics with a single answer.
    """
    groups: dict[GroupKey, list[Record]] = defaultdict(list)
    for record in records:
        if TASKS[record.task].scorer == "none":
            continue
        try:
            turn = last_turn(record, coordinates)
        except SkipSample:
            continue
        written = dataclasses.replace(record, turns=(turn,))  # the truth is written once, not for each score
        for key in {(asked_task(record), topic_of(record)), (asked_task(record), "")}:
            groups[key].append(written)
    constants = {}
    for (task, topic), group in groups.items():
        answers = Counter(record.turns[0].answer for record in group)
        if topic and len(answers) == 1:
            continue  # such a topic follows from the answer, which a guess does not know
        mean = mean_geometry(list(answers.elements()), coordinates)
        tests = random.Random(seed).sample(group, min(sample, len(group)))
        constants[task, topic] = max(
            dict.fromkeys([*(answer for answer, _ in answers.most_common(candidates)), *([mean] if mean else [])]),
            key=lambda answer: sum(scorer_of(record).value(answer, record, coordinates) for record in tests),
        )
    return constants


def mean_geometry(answers: Sequence[str], coordinates: Coordinates) -> str:
    """The mean box of answers that are boxes, or the phrases of at least half of the grounded
    answers, at mean places.

    It is "" where the answers have no geometry, or share no phrase.
    """
    grounded: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    plain: list[tuple[float, ...]] = []
    for answer in answers:
        items = coordinates.parse_grounded(answer)
        for item in {item.phrase: item for item in reversed(items)}.values():
            grounded[item.phrase].append((item.boxes or item.points)[0])
        if not items:
            plain += coordinates.parse_boxes(answer)
    if not grounded:
        return _mean_text(plain, coordinates) if plain else ""
    common = [(phrase, places) for phrase, places in grounded.items() if 2 * len(places) >= len(answers)]
    return "".join(f"<p>{phrase}</p>{_mean_text(places, coordinates)}" for phrase, places in common)


def _mean_text(places: Sequence[tuple[float, ...]], coordinates: Coordinates) -> str:
    # A box and a point have no mean: where a phrase has both, the kind of the first one counts.
    kind = len(places[0])
    same = [place for place in places if len(place) == kind]
    return coordinates.boxes([[sum(values) / len(same) for values in zip(*same, strict=True)]], (1, 1))


def constant_predictions(
    predictions: Sequence[Prediction],
    records: Mapping[str, Record],
    constants: Mapping[GroupKey, str],
    coordinates: Coordinates,
) -> list[Prediction]:
    """The constants' answers to the same questions. Questions of a task without a constant are
    skipped.

    Args:
        records: by key.
    """
    answers = []
    for prediction in predictions:
        record = records[prediction.key]
        task = asked_task(record)
        text = constants.get((task, topic_of(record)), constants.get((task, "")))
        if text is not None:
            answers.append(score_answer(record, text, coordinates))
    return answers
