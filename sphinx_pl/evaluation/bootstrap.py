"""The percentile bootstrap (Efron 1979) over independent units."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def draws(counts: Counts, resamples: int, seed: int) -> Iterator[Counts]:
    """[at most `resamples`, kinds], how often each kind of unit counts in a resample.

    The arrays have `resamples` rows together, and each is small enough to be kept in memory.

    Args:
        counts: [kinds], the number of units of each kind. Units that are equal in all that is
            computed may be one kind, which has the same distribution and is cheaper.
    """
    generator, total = np.random.default_rng(seed), int(counts.sum())
    at_once = max(1, 2**22 // len(counts))
    for start in range(0, resamples, at_once):
        yield generator.multinomial(total, counts / total, size=min(at_once, resamples - start))


def interval(values: Floats) -> tuple[float, float]:
    """The ends of the middle LEVEL of resampled values without NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    with np.errstate(invalid="ignore"):  # the difference of two infinite values
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
