"""What makes one model better than another: a mean of held-out losses or of scores, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphinx_pl.evaluation.losses import SourceLoss
from sphinx_pl.utils.errors import UserError, suggest

Measures = Mapping[str, SourceLoss]
"""By name: `loss/SOURCE` in nats a token, lower is better; `score/TASK` from 0 to 1, higher is better."""

LOSS, SCORE = "loss", "score"


@dataclass(frozen=True)
class Criterion:
    """`loss` or `score`: the mean of all of that kind, each counting alike; or one of them by name."""

    said: str = LOSS

    def __post_init__(self) -> None:
        kind = self.said.partition("/")[0]
        if kind not in (LOSS, SCORE):
            raise UserError(f"criterion={self.said} must be loss, score, loss/SOURCE or score/TASK")

    @property
    def lower(self) -> bool:
        """Whether lower is better."""
        return self.said.startswith(LOSS)

    def names(self, measures: Iterable[str]) -> list[str]:
        """Of those measures that it is made of.

        Raises:
            UserError: there are none.
        """
        known = list(measures)
        found = [name for name in known if self.said in (name, name.partition("/")[0])]
        if not found:
            raise UserError(f"criterion={self.said} is not measured: {suggest(self.said, known)}")
        return found

    def value(self, measures: Measures) -> float:
        names = self.names(measures)
        return math.fsum(measures[name].mean for name in names) / len(names)

    def cost(self, measures: Measures) -> float:
        """Lower is better. Infinite where the value is no number: a model that computes NaN is never the best."""
        value = self.value(measures)
        return (value if self.lower else -value) if math.isfinite(value) else math.inf

    def check(self, best: float) -> None:
        """Raises: UserError: the lowest cost that was found is no number."""
        if not math.isfinite(best):
            raise UserError(
                f"no model or mixture that was evaluated has a {self.said} that is a number: their weights are too "
                "large to compute with, or broken"
            )


def resampled(points: Sequence[Measures], names: Sequence[str], resamples: int = 1000, seed: int = 0) -> Tensor:
    """The mean of the measures `names` at every point [resamples, points], under a bootstrap over samples.

    All points are given the same samples each time: what makes a sample hard is common to them, so their differences
    are much surer than they themselves (Efron & Tibshirani 1993, paired).
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(resamples, len(points), dtype=torch.float64)
    for name in names:
        sums = torch.stack([point[name].sums for point in points])  # [points, samples]
        counts = torch.stack([point[name].tokens for point in points])
        samples = sums.shape[1]
        for row in means:  # a resample at a time: all at once would be points times as much memory
            drawn = torch.randint(samples, (samples,), generator=generator)
            times = torch.bincount(drawn, minlength=samples).double()
            row += (sums @ times) / (counts @ times) / len(names)
    return means
