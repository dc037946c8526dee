"""Spherical interpolation: along the arc between two tensors instead of the chord."""

from __future__ import annotations

import math
from typing import Any

from sphinx_pl.mixing.methods import METHODS, Method, Options, Passes, Weights

PARALLEL = 0.9995
"""Cosine from which on arc and chord count as equal: they differ by 1e-4 of their length."""


def slerp_coefficients(cosine: float, weights: Weights) -> list[float]:
    """sin(wᵢΩ)/sin Ω, Ω the angle between the two; the weights if they are parallel."""
    if abs(cosine) > PARALLEL or 0 in weights:
        return list(weights)
    angle = math.acos(cosine)
    return [math.sin(weight * angle) / math.sin(angle) for weight in weights]


def cosine(passes: Passes, weights: Weights, options: Options) -> float:
    """The cosine of the angle between the two whole tensors; 0 if one of them is zero."""
    dot, first, second = 0.0, 0.0, 0.0
    for stretch in passes():
        a, b = (tensor.double() for tensor in stretch.tensors)
        dot, first, second = dot + float(a @ b), first + float(a @ a), second + float(b @ b)
    lengths = math.sqrt(first) * math.sqrt(second)
    return max(-1.0, min(1.0, dot / lengths)) if lengths else 0.0


def coefficients(weights: Weights, options: Options, measured: Any) -> list[float]:
    """Those of the angle between the two tensors, whose lengths are left as they are."""
    return slerp_coefficients(measured, weights)


METHODS.register(
    "slerp",
    Method("Animating rotation with quaternion curves (Shoemake 1985)", coefficients, measure=cosine, count=2),
)
