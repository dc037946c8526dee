"""The scores of the task suite: a row for each task and part, beside baselines."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sphinx_pl.evaluation.metrics import bootstrap
from sphinx_pl.evaluation.runner import Prediction


@dataclass(frozen=True)
class ScoreRow:
    """The scores of one group: a task, or a domain and topic of it ("" = all).

    `low` and `high` are the 95 % interval of `score`.
    """

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


def summarise(
    predictions: Sequence[Prediction], baselines: Mapping[str, Sequence[Prediction]] | None = None, seed: int = 0
) -> list[ScoreRow]:
    """One row per task, followed by one per domain and topic of it where there are several.

    Args:
        baselines: name -> predictions of a baseline on the same records.
    """
    scores = {kind: {other.key: other.score for other in answers} for kind, answers in (baselines or {}).items()}

    def row(group: Sequence[Prediction], task: str, domain: str, topic: str) -> ScoreRow:
        own = [prediction.score for prediction in group]
        low, high = bootstrap(own, seed)
        compared = {
            kind: [by_key[prediction.key] for prediction in group if prediction.key in by_key]
            for kind, by_key in scores.items()
        }
        return ScoreRow(
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
