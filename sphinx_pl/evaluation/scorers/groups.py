"""Means of scores by group: question types, subjects, splits."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean


def mean_by(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean score of each group, groups in the order in which they first came; {} of nothing.

    The per-type accuracies of SEED-Bench, GQA and MMBench are such means. Their overall accuracy is that of all
    questions together, not the mean of these.
    """
    groups: dict[str, list[float]] = {}
    for group, score in scores:
        groups.setdefault(group, []).append(float(score))
    return {group: fmean(values) for group, values in groups.items()}
