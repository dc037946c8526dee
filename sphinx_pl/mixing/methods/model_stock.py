"""Model stock: how far from the base to the models' average, from the angle between what they have
learned."""

from __future__ import annotations

import math
from typing import Any

import torch

from sphinx_pl.mixing.methods import METHODS, Method, Options, Passes, Weights
from sphinx_pl.mixing.methods.linear import equal_weights


def ratio(cosine: float, count: int) -> float:
    """t = N·cos θ / (1 + (N - 1)·cos θ), between 0 (the base) and 1 (the average)."""
    below = 1 + (count - 1) * cosine
    return max(0.0, min(1.0, count * cosine / below)) if below > 0 else 0.0


def measure(passes: Passes, weights: Weights, options: Options) -> float:
    """t, of the mean cosine between the differences of two models to the base."""
    count = len(weights)
    products = torch.zeros(count, count, dtype=torch.float64)
    for stretch in passes():
        deltas = torch.stack([delta.double() for delta in stretch.deltas()])
        products += deltas @ deltas.T
    pairs = [(i, j) for i in range(count) for j in range(i)]
    lengths = products.diagonal().sqrt()
    cosines = [float(products[i, j] / (lengths[i] * lengths[j])) if lengths[i] * lengths[j] else 0.0 for i, j in pairs]
    return ratio(math.fsum(cosines) / len(cosines), count) if cosines else 1.0


def coefficients(weights: Weights, options: Options, measured: Any) -> list[float]:
    """t·(average of the models) + (1 - t)·base."""
    return [*(measured * weight for weight in weights), 1 - measured]


METHODS.register(
    "model_stock",
    Method("Model stock (Jang et al. 2024)", coefficients, measure=measure, base=True, weights=equal_weights),
)
