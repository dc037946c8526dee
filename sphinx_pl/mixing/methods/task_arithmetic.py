"""Task arithmetic: what each model has learned since the base is scaled and added to the base."""

from __future__ import annotations

import math
from typing import Any

from sphinx_pl.mixing.methods import METHODS, Method, Options, Weights


def coefficients(weights: Weights, options: Options, measured: Any) -> list[float]:
    """base + Σ λᵢ·(θᵢ - base), so that λ = 1 of one model is that model."""
    return [*weights, 1 - math.fsum(weights)]


METHODS.register(
    "task_arithmetic", Method("Editing models with task arithmetic (Ilharco et al. 2023)", coefficients, base=True)
)
