"""Task arithmetic: what each model has learned since the base is scaled and added to the base."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sphinx_pl.mixing.methods import METHODS, Method, Options, Stretch, Weights, combine


def task_arithmetic(stretch: Stretch, weights: Weights, options: Options, measured: Any) -> Tensor:
    """base + Σ λᵢ·(θᵢ - base), computed as (1 - Σ λᵢ)·base + Σ λᵢ·θᵢ, so that λ = 1 of one model is that model."""
    assert stretch.base is not None
    return combine([*stretch.tensors, stretch.base], [*weights, 1 - math.fsum(weights)])


METHODS.register(
    "task_arithmetic", Method("Editing models with task arithmetic (Ilharco et al. 2023)", task_arithmetic, base=True)
)
