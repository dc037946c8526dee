"""Numbers that stand for many predictions, their bootstrap intervals, and whether two models differ in them.

Most measures are a function of sums over units that were drawn independently (a question, an image with its two
questions, a question in all its rotations): accuracy is right / all, F1 is of true and false positives. A resample of
such a measure is a product of counts and the units' addends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sphinx_pl.evaluation.runner import Prediction

RESAMPLES = 2000
LEVEL = 0.95
_ROUNDING = 1e-12

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Prepared(Protocol):
    """A measure's view of predictions. `units`: names, the same for predictions of two models on the same questions."""

    @property
    def units(self) -> Sequence[str]: ...

    def values(self, counts: Counts) -> Floats:
        """[resamples, units], how often each unit counts -> [resamples]; NaN where the measure is not defined."""
        ...


class Measure(Protocol):
    """`description` is the definition; `percent`: whether values are shares, shown as per cent, or points."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def percent(self) -> bool: ...

    def prepare(self, predictions: Sequence[Prediction]) -> Prepared: ...


@dataclass(frozen=True)
class Sums:
    """`rows` [units, k] are added up, `finish` makes [..., k] sums to [...] values.

    Of a mean (`finish` is `ratio`) `most` is the highest score; the lowest is 0.
    """

    units: Sequence[str]
    rows: Floats
    finish: Callable[[Floats], Floats]
    most: float = 1.0

    def values(self, counts: Counts) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.finish(counts @ self.rows), dtype=np.float64)


@dataclass(frozen=True)
class Whole:
    """A value of all units together, of which no resample is known."""

    units: Sequence[str]
    value: float

    def values(self, counts: Counts) -> Floats:
        return np.where((counts == 1).all(axis=1), self.value, np.nan)


@dataclass(frozen=True)
class Additive:
    """A measure that is a function of sums.

    Args:
        addends: of the predictions of one unit, in their order.
        finish: [..., k] sums -> [...].
        unit: which predictions belong together; by default each stands alone.
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
    """Of the first of two sums to the second."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def mean(name: str, description: str, score: Callable[[Prediction], float] = lambda p: p.score) -> Additive:
    """The mean of the predictions' scores, each a unit."""
    return Additive(name, description, lambda group: (sum(map(score, group)), len(group)), ratio)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval, NaN where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Of two models' values on the same units, second minus first.

    Attributes:
        p: two-sided, by the bootstrap: twice the smaller share of resamples on one side of 0. Where there are none on
            it, which says no more than that p is below 0.001, by a normal distribution with the resamples' spread. At
            least 2 / 2^units, the least that any test of paired units can give (all signs of their differences alike).
            NaN where the difference, or every resample of it, is not defined.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    p: float
    units: int


def bootstrap(scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of the mean of `scores`."""
    rows = np.stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))], axis=1)
    found = estimate(Sums([str(i) for i in range(len(scores))], rows, ratio), seed, resamples)
    return found.low, found.high


def estimate(prepared: Prepared, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The value and its percentile interval over resampled units.

    Where all units are alike, so is every resample, which says nothing of what was not drawn: the interval is that of
    `_alike` for a mean of scores, NaN for other measures.
    """
    value = float(prepared.values(np.ones((1, len(prepared.units)), dtype=np.int64))[0])
    if (alike := _alike(prepared)) is not None:
        return Estimate(value, *alike)
    drawn = _resampled([prepared], seed, resamples)[0]
    if len(drawn) and np.nanmax(drawn, initial=-math.inf) - np.nanmin(drawn, initial=math.inf) < _ROUNDING:
        return Estimate(value, math.nan, math.nan)
    return Estimate(value, *_interval(drawn))


def _alike(prepared: Prepared) -> tuple[float, float] | None:
    """The interval of a mean of scores that are all the same; None elsewhere.

    With a confidence of 97.5 % at least the share 0.025 ** (1 / n) of all units is like the n drawn ones; the others
    have 0 at worst, `most` at best. Of shares of right answers this is Clopper and Pearson's (1934).
    """
    if not isinstance(prepared, Sums) or prepared.finish is not ratio or not len(prepared.rows):
        return None
    scores, counted = prepared.rows.T
    if (counted != 1).any() or (scores != scores[0]).any() or not 0 <= scores[0] <= prepared.most:
        return None
    least = ((1 - LEVEL) / 2) ** (1 / len(scores))
    low = float(scores[0]) * least
    return low, low + prepared.most * (1 - least)


def difference(first: Prepared, second: Prepared, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Paired: both models' values come from the same resampled units, so that what is hard for both cancels.

    Raises:
        ValueError: other units.
    """
    if list(first.units) != list(second.units):
        raise ValueError("the two were not asked the same")
    ones = np.ones((1, len(first.units)), dtype=np.int64)
    before, after = float(first.values(ones)[0]), float(second.values(ones)[0])
    drawn = _resampled([first, second], seed, resamples)
    apart = drawn[1] - drawn[0]
    apart = apart[~np.isnan(apart)]
    low, high = _interval(apart)
    # With 1 added to both, p is never 0 (Davison and Hinkley 1997, section 4.2).
    units, p = len(first.units), math.nan
    if len(apart) and not math.isnan(after - before):
        beyond = min(np.count_nonzero(side) for side in (apart <= 0, apart >= 0))
        p = min(1.0, 2 * (1 + beyond) / (1 + len(apart)))
        if not beyond:
            spread = float(apart.std())
            p = min(p, math.erfc(abs(after - before) / spread / math.sqrt(2)) if spread else 0.0)
        p = max(p, 2.0 ** (1 - units))
    return Difference(before, after, after - before, low, high, p, units)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * p_values[i]))
        corrected[i] = least
    return corrected


def _interval(values: Floats) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(prepared: Sequence[Prepared], seed: int, resamples: int) -> list[Floats]:
    """Values of each on the same resamples."""
    if any(isinstance(one, Whole) for one in prepared):
        return [np.full(resamples, np.nan) for _ in prepared]
    sums = [one for one in prepared if isinstance(one, Sums)]
    if len(sums) == len(prepared):
        # Units with equal addends are counted together: a resample is then one multinomial draw over the kinds of
        # units, the same in distribution and cheap.
        rows, counts = np.unique(np.concatenate([one.rows for one in sums], axis=1), axis=0, return_counts=True)
        widths = np.cumsum([one.rows.shape[1] for one in sums])[:-1]
        parts = np.split(rows, widths, axis=1)
        prepared = [Sums([""] * len(rows), part, one.finish) for part, one in zip(parts, sums, strict=True)]
    else:
        counts = np.ones(len(prepared[0].units), dtype=np.int64)
    generator, total = np.random.default_rng(seed), int(counts.sum())
    at_once = max(1, 2**22 // len(counts))
    found: list[list[Floats]] = [[] for _ in prepared]
    for start in range(0, resamples, at_once):
        drawn = generator.multinomial(total, counts / total, size=min(at_once, resamples - start))
        for values, one in zip(found, prepared, strict=True):
            values.append(one.values(drawn))
    return [np.concatenate(values) for values in found]


def to_json(found: Estimate, measure: Measure) -> dict[str, Any]:
    """An estimate with the measure's name and unit; NaN, which JSON lacks, as None."""
    numbers = {"value": found.value, "low": found.low, "high": found.high}
    return {"measure": measure.name, "percent": measure.percent, **{key: defined(n) for key, n in numbers.items()}}


def defined(number: float) -> float | None:
    """A number, or None for NaN, which JSON lacks."""
    return None if math.isnan(number) else number


def number_text(value: float | None, percent: bool) -> str:
    """A measure's value with one decimal; shares as per cent."""
    return "–" if value is None else f"{100 * value if percent else value:.1f}"
