"""The objective of a choice between models: a mean of held-out losses or of scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphinx_pl.evaluation.losses import SourceLoss, resampled_means
from sphinx_pl.utils.errors import UserError, suggest

Measurements = Mapping[str, SourceLoss]
"""Losses and scores by name: `loss/SOURCE` in nats a token, `score/TASK` from 0 to 1."""

LOSS, SCORE = "loss", "score"


@dataclass(frozen=True)
class Objective:
    """`loss` or `score`: the mean of all of that kind, each counting alike; or one of them by name."""

    name: str = LOSS

    def __post_init__(self) -> None:
        kind = self.name.partition("/")[0]
        if kind not in (LOSS, SCORE):
            raise UserError(f"objective={self.name} must be loss, score, loss/SOURCE or score/TASK")

    @property
    def lower(self) -> bool:
        """Whether lower is better."""
        return self.name.startswith(LOSS)

    def names(self, measurements: Iterable[str]) -> list[str]:
        """The names among `measurements` that the objective is the mean of.

        Raises:
            UserError: there are none.
        """
        available = list(measurements)
        names = [name for name in available if self.name in (name, name.partition("/")[0])]
        if not names:
            raise UserError(f"objective={self.name} is not measured: {suggest(self.name, available)}")
        return names

    def value(self, measurements: Measurements) -> float:
        names = self.names(measurements)
        return math.fsum(measurements[name].mean for name in names) / len(names)

    def cost(self, measurements: Measurements) -> float:
        """The value with its sign such that lower is better. It is infinite for NaN, so a broken
        model is never best."""
        value = self.value(measurements)
        return (value if self.lower else -value) if math.isfinite(value) else math.inf

    def check(self, best: float) -> None:
        """Check the lowest cost of all evaluated models.

        Raises:
            UserError: it is no number.
        """
        if not math.isfinite(best):
            raise UserError(
                f"no evaluated model or mixture has a finite {self.name}: their weights are too large to compute "
                "with, or broken"
            )


def resampled(points: Sequence[Measurements], names: Sequence[str], resamples: int = 1000, seed: int = 0) -> Tensor:
    """The mean of the measurements `names` at every point [resamples, points], under a bootstrap
    over samples that all points share.

    Each measurement has resamples of its own, since its samples are others.
    """
    means = torch.zeros(resamples, len(points), dtype=torch.float64)
    for place, name in enumerate(names):
        means += resampled_means([point[name] for point in points], resamples, seed + place) / len(names)
    return means
