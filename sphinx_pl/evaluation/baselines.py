"""What guessing reaches: the best constant answer of each group, chosen on training records."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.metrics import METRICS, last_turn
from sphinx_pl.evaluation.question import asked_task
from sphinx_pl.evaluation.runner import Prediction, judge, topic_of

CANDIDATES = 50
SAMPLE = 500

GroupKey = tuple[str, str]
"""Task (`asked_task`) and topic: what a constant answer may depend on, since the question tells both."""


def fit_constants(
    records: Iterable[Record],
    coordinates: Coordinates,
    candidates: int = CANDIDATES,
    sample: int = SAMPLE,
    seed: int = 0,
) -> dict[GroupKey, str]:
    """The constant answer with the best mean score in training: of each task and topic, and of each task (topic "").

    Candidates are the `candidates` most frequent answers and, where answers have geometry, the mean one. Each is scored
    on at most `sample` records, drawn with `seed`. Records that their task cannot use are passed over, and so are
    topics with a single answer.
    """
    groups: dict[GroupKey, list[Record]] = defaultdict(list)
    for record in records:
        if TASKS[record.task].scorer == "none":
            continue
        try:
            turn = last_turn(record, coordinates)
        except SkipSample:
            continue
        written = dataclasses.replace(record, turns=(turn,))  # so that no score writes it again
        for key in {(asked_task(record), topic_of(record)), (asked_task(record), "")}:
            groups[key].append(written)
    constants = {}
    for (task, topic), group in groups.items():
        answers = Counter(record.turns[0].answer for record in group)
        if topic and len(answers) == 1:
            continue  # such a topic names the answer, not the question: whoever guesses does not know it
        mean = mean_geometry(list(answers.elements()), coordinates)
        tried = random.Random(seed).sample(group, min(sample, len(group)))
        constants[task, topic] = max(
            dict.fromkeys([*(answer for answer, _ in answers.most_common(candidates)), *([mean] if mean else [])]),
            key=lambda answer: sum(_score(answer, record, coordinates) for record in tried),
        )
    return constants


def _score(answer: str, record: Record, coordinates: Coordinates) -> float:
    return METRICS[TASKS[record.task].scorer].score(answer, record, coordinates)


def mean_geometry(answers: Sequence[str], coordinates: Coordinates) -> str:
    """The mean box of answers that are boxes; of grounded ones, the phrases of at least half of them, at mean places.

    "" where the answers hold no geometry, or share no phrase.
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
    # A phrase that is a box in one answer and a point in another has no mean: the first one's kind counts.
    kind = len(places[0])
    same = [place for place in places if len(place) == kind]
    return coordinates.boxes([[sum(values) / len(same) for values in zip(*same, strict=True)]], (1, 1))


def constant_predictions(
    predictions: Sequence[Prediction],
    records: Mapping[str, Record],
    constants: Mapping[GroupKey, str],
    coordinates: Coordinates,
) -> list[Prediction]:
    """What the constants would have answered to the same questions; those of a task without one are left out.

    Args:
        records: by key.
    """
    answered = []
    for prediction in predictions:
        record = records[prediction.key]
        task = asked_task(record)
        text = constants.get((task, topic_of(record)), constants.get((task, "")))
        if text is not None:
            answered.append(judge(record, text, coordinates))
    return answered
