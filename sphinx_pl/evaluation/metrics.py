"""Metrics: numbers of many scores, with bootstrap intervals, and the differences between two
models.

Most metrics are a function of sums over independent units: a question, an image with its two
questions, a question in all its rotations. Accuracy is right / all, F1 follows from true and false
positives. A resample of such a metric is a product of counts and the units' addends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sphinx_pl.evaluation.bootstrap import LEVEL, Counts, Floats, draws, interval
from sphinx_pl.evaluation.runner import Prediction

RESAMPLES = 2000
_ROUNDING = 1e-12


class Prepared(Protocol):
    """A metric's view of predictions. `units` are names that two models share."""

    @property
    def units(self) -> Sequence[str]: ...

    def values(self, counts: Counts) -> Floats:
        """[resamples, units] counts of units -> [resamples]; NaN where the metric is undefined."""
        ...


class Metric(Protocol):
    """A number of many predictions.

    `description` is its definition. `percent` says whether values are shares, shown as per cent, or
    points.
    """

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def percent(self) -> bool: ...

    def prepare(self, predictions: Sequence[Prediction]) -> Prepared: ...


@dataclass(frozen=True)
class Sums:
    """A function of sums: `rows` [units, k] are added up, and `finish` turns [..., k] sums into
    [...] values.

    For a mean (`finish` is `ratio`), `most` is the highest score; the lowest is 0.
    """

    units: Sequence[str]
    rows: Floats
    finish: Callable[[Floats], Floats]
    most: float = 1.0

    def values(self, counts: Counts) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.finish(counts @ self.rows), dtype=np.float64)


@dataclass(frozen=True)
class Unsplittable:
    """A value of all units together, which cannot be resampled."""

    units: Sequence[str]
    value: float

    def values(self, counts: Counts) -> Floats:
        return np.where((counts == 1).all(axis=1), self.value, np.nan)


@dataclass(frozen=True)
class Additive:
    """A metric that is a function of sums.

    Args:
        addends: the predictions of one unit, in their order -> k numbers.
        finish: [..., k] sums -> [...].
        unit: a name that predictions share which belong together; by default each stands alone.
    """

    name: str
    description: str
    addends: Callable[[Sequence[Prediction]], Sequence[float]]
    finish: Callable[[Floats], Floats]
    unit: Callable[[Prediction], str] = lambda prediction: prediction.key
    percent: bool = True

    def prepare(self, predictions: Sequence[Prediction]) -> Sums:
        groups: dict[str, list[Prediction]] = {}
        for prediction in predictions:
            groups.setdefault(self.unit(prediction), []).append(prediction)
        rows = np.array([self.addends(group) for group in groups.values()], dtype=np.float64)
        return Sums(list(groups), rows, self.finish)


def ratio(sums: Floats) -> Floats:
    """The ratio of the first of two sums to the second."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def mean(name: str, description: str, score: Callable[[Prediction], float] = lambda p: p.score) -> Additive:
    """The metric that is the mean of the predictions' scores, each of them a unit."""
    return Additive(name, description, lambda group: (sum(map(score, group)), len(group)), ratio)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval, which is NaN where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The difference of two models' values on the same units, second minus first.

    Attributes:
        p: two-sided, by the bootstrap: twice the smaller share of resamples on one side of 0. If
            that side has none, p is below 0.001, and a normal distribution with the resamples'
            spread gives its value. p is at least 2 / 2^units, the least of any test of paired
            units. It is NaN where the difference is undefined.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    p: float
    units: int


def bootstrap(scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `scores`."""
    rows = np.stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))], axis=1)
    result = estimate(Sums([str(i) for i in range(len(scores))], rows, ratio), seed, resamples)
    return result.low, result.high


def estimate(prepared: Prepared, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The value and its percentile interval over resampled units.

    Where all units are alike, all resamples are too, and tell nothing about other units. There the
    interval is that of `_alike` for a mean of scores, and NaN for other metrics.
    """
    value = float(prepared.values(np.ones((1, len(prepared.units)), dtype=np.int64))[0])
    if (alike := _alike(prepared)) is not None:
        return Estimate(value, *alike)
    values = _resampled([prepared], seed, resamples)[0]
    if len(values) and np.nanmax(values, initial=-math.inf) - np.nanmin(values, initial=math.inf) < _ROUNDING:
        return Estimate(value, math.nan, math.nan)
    return Estimate(value, *interval(values))


def _alike(prepared: Prepared) -> tuple[float, float] | None:
    """The interval of a mean of scores that are all the same; None for others.

    With a confidence of 97.5 %, at least the share 0.025 ** (1 / n) of all units is like the n
    drawn ones. The others have 0 at worst and `most` at best. For shares of right answers this is
    Clopper and Pearson's interval (1934).
    """
    if not isinstance(prepared, Sums) or prepared.finish is not ratio or not len(prepared.rows):
        return None
    scores, weights = prepared.rows.T
    if (weights != 1).any() or (scores != scores[0]).any() or not 0 <= scores[0] <= prepared.most:
        return None
    least = ((1 - LEVEL) / 2) ** (1 / len(scores))
    low = float(scores[0]) * least
    return low, low + prepared.most * (1 - least)


def difference(first: Prepared, second: Prepared, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """The paired difference: both values come from the same resampled units, so units hard for both
    cancel.

    Raises:
        ValueError: the units differ.
    """
    if list(first.units) != list(second.units):
        raise ValueError("the two models did not answer the same questions")
    ones = np.ones((1, len(first.units)), dtype=np.int64)
    before, after = float(first.values(ones)[0]), float(second.values(ones)[0])
    resampled = _resampled([first, second], seed, resamples)
    changes = resampled[1] - resampled[0]
    changes = changes[~np.isnan(changes)]
    low, high = interval(changes)
    # With 1 added to both, p is never 0 (Davison and Hinkley 1997, section 4.2).
    units, p = len(first.units), math.nan
    if len(changes) and not math.isnan(after - before):
        beyond = min(np.count_nonzero(side) for side in (changes <= 0, changes >= 0))
        p = min(1.0, 2 * (1 + beyond) / (1 + len(changes)))
        if not beyond:
            spread = float(changes.std())
            p = min(p, math.erfc(abs(after - before) / spread / math.sqrt(2)) if spread else 0.0)
        p = max(p, 2.0 ** (1 - units))
    return Difference(before, after, after - before, low, high, p, units)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * p_values[i]))
        corrected[i] = least
    return corrected


def _resampled(prepared: Sequence[Prepared], seed: int, resamples: int) -> list[Floats]:
    """The values of each on the same resamples."""
    if any(isinstance(one, Unsplittable) for one in prepared):
        return [np.full(resamples, np.nan) for _ in prepared]
    sums = [one for one in prepared if isinstance(one, Sums)]
    if len(sums) == len(prepared):
        # Units with equal addends are one kind.
        rows, counts = np.unique(np.concatenate([one.rows for one in sums], axis=1), axis=0, return_counts=True)
        widths = np.cumsum([one.rows.shape[1] for one in sums])[:-1]
        parts = np.split(rows, widths, axis=1)
        prepared = [Sums([""] * len(rows), part, one.finish) for part, one in zip(parts, sums, strict=True)]
    else:
        counts = np.ones(len(prepared[0].units), dtype=np.int64)
    chunks = [[one.values(times) for one in prepared] for times in draws(counts, resamples, seed)]
    return [np.concatenate(values) for values in zip(*chunks, strict=True)]


def to_json(value: Estimate, metric: Metric) -> dict[str, Any]:
    """An estimate with the metric's name and unit. JSON lacks NaN, so None stands for it."""
    numbers = {"value": value.value, "low": value.low, "high": value.high}
    return {"measure": metric.name, "percent": metric.percent, **{key: defined(n) for key, n in numbers.items()}}


def defined(number: float) -> float | None:
    """The number, or None for NaN, which JSON lacks."""
    return None if math.isnan(number) else number


def number_text(value: float | None, percent: bool) -> str:
    """A metric's value with one decimal; shares are in per cent."""
    return "–" if value is None else f"{100 * value if percent else value:.1f}"
