"""Spherical interpolation: along the arc between two tensors instead of the chord."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sphinx_pl.mixing.methods import METHODS, Method, Options, Passes, Stretch, Weights, combine

PARALLEL = 0.9995
"""Cosine from which on arc and chord are the same in float32, and dividing by the sine loses digits."""


def slerp_coefficients(cosine: float, weights: Weights) -> list[float]:
    """sin(w₁Ω)/sin Ω and sin(w₂Ω)/sin Ω, Ω the angle between the two; the weights themselves if they are parallel."""
    if abs(cosine) > PARALLEL or 0 in weights:
        return list(weights)
    angle = math.acos(cosine)
    return [math.sin(weight * angle) / math.sin(angle) for weight in weights]


def measure(passes: Passes, weights: Weights, options: Options) -> list[float]:
    """The coefficients, from the angle between the two tensors as wholes."""
    dot, first, second = 0.0, 0.0, 0.0
    for stretch in passes():
        a, b = (tensor.double() for tensor in stretch.tensors)
        dot, first, second = dot + float(a @ b), first + float(a @ a), second + float(b @ b)
    lengths = math.sqrt(first) * math.sqrt(second)
    return slerp_coefficients(max(-1.0, min(1.0, dot / lengths)) if lengths else 1.0, weights)


def slerp(stretch: Stretch, weights: Weights, options: Options, measured: Any) -> Tensor:
    """The two tensors with the coefficients of their angle; their lengths are left as they are."""
    return combine(stretch.tensors, measured)


METHODS.register("slerp", Method("Animating rotation with quaternion curves (Shoemake 1985)", slerp, measure, count=2))
