"""Weighted averages: given weights, equal ones (a soup), those of a moving average over a run's
checkpoints."""

from __future__ import annotations

from typing import Any

from sphinx_pl.mixing.methods import METHODS, Method, Options, Weights


def coefficients(weights: Weights, options: Options, measured: Any) -> Weights:
    """Σ wᵢ·θᵢ."""
    return weights


def equal_weights(count: int, options: Options) -> list[float]:
    return [1 / count] * count


def ema_weights(count: int, options: Options) -> list[float]:
    """The weights of checkpoints, oldest first, in θ̄ₖ = d·θ̄ₖ₋₁ + (1-d)·θₖ with θ̄₁ = θ₁."""
    decay = options["decay"]
    return [decay ** (count - 1), *((1 - decay) * decay ** (count - 1 - i) for i in range(1, count))]


SOUPS = "Model soups (Wortsman et al. 2022)"

METHODS.register("linear", Method(f"SPHINX (Lin et al. 2023), section 3.1; {SOUPS}", coefficients))
METHODS.register("uniform_soup", Method(SOUPS, coefficients, weights=equal_weights))
# The same, once `sphinx_pl.evaluation.mixtures.search` has found out which checkpoints to average.
METHODS.register("greedy_soup", Method(SOUPS, coefficients))
METHODS.register(
    "ema",
    Method(
        "Averages of a run's iterates (Polyak & Juditsky 1992; Mean teachers, Tarvainen & Valpola 2017)",
        coefficients,
        weights=ema_weights,
        options={"decay": 0.5},
        ranges={"decay": (0, 1)},
    ),
)
