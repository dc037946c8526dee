"""TIES: of each model's difference to the base the largest entries only, and of these only those of
the same sign."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.mixing.methods import METHODS, Method, Options, Passes, Stretch, Weights

_DIGIT = 16
"""Bits that are told apart in one pass over a tensor."""


def kth_largest(values: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th largest of values ≥ 0 (k from 1 on), which come in pieces of one floating dtype, in
    bounded memory.

    The bits of numbers ≥ 0 are ordered as the numbers are. So each pass counts one digit of 16
    bits, of those values that have the digits found before: two passes in float32, four in float64.
    """
    prefix, fixed = 0, 0  # digits that were found, and how many bits they are
    bits, kind = 31, torch.int32
    while fixed < bits:
        width = min(_DIGIT, bits - fixed)
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for piece in values():
            if piece.dtype == torch.float64:
                bits, kind = 63, torch.int64
            numbers = piece.view(kind).long()
            shift = bits - fixed - width
            candidates = numbers[numbers >> (shift + width) == prefix] if fixed else numbers
            counts += torch.bincount((candidates >> shift) & ((1 << width) - 1), minlength=1 << width)
        above = counts.flip(0).cumsum(0)  # how many have this digit or a larger one, from the largest on
        place = int((above < k).sum())
        digit = len(counts) - 1 - place
        k -= int(above[place - 1]) if place else 0
        prefix, fixed = (prefix << width) | digit, fixed + width
    return float(torch.tensor(prefix, dtype=kind).view(torch.float64 if bits == 63 else torch.float32))


def thresholds(passes: Passes, weights: Weights, options: Options) -> list[float]:
    """The least size of a kept entry in each difference: the density · n largest are kept."""
    numel = sum(stretch.tensors[0].numel() for stretch in passes())
    k = max(1, int(options["density"] * numel))  # of a single number that number
    if options["density"] == 0 or numel == 0:
        return [float("inf")] * len(weights)
    if k >= numel:
        return [0.0] * len(weights)

    def magnitudes(model: int) -> Iterable[Tensor]:
        return ((stretch.tensors[model] - _base(stretch)).abs() for stretch in passes())

    return [kth_largest(lambda model=model: magnitudes(model), k) for model in range(len(weights))]  # type: ignore[misc]


def elect(deltas: Sequence[Tensor], weights: Weights, average: bool) -> Tensor:
    """For each entry the sign that has more weight, and the sum of the weighted differences that
    have it.

    Args:
        average: divide by the weights of those that have it: a mean of the models that agree.
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    positive = torch.stack(weighted).sum(0) >= 0
    total, agreeing = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        total += torch.where(agrees, delta, 0)
        agreeing += agrees.to(agreeing.dtype) * weight  # of a bool it would be float32's weight
    # Weights of both signs can cancel: nothing to divide by.
    return total / torch.where(agreeing.abs() < 1e-8, 1, agreeing) if average else total


def ties(stretch: Stretch, weights: Weights, options: Options, measured: Any) -> Tensor:
    """base + λ·(trimmed differences of the elected sign, averaged)."""
    kept = [torch.where(d.abs() >= at, d, 0) for d, at in zip(stretch.deltas(), measured, strict=True)]
    scale: float = options["scale"]
    return _base(stretch) + elect(kept, weights, options["average"]) * scale


def _base(stretch: Stretch) -> Tensor:
    assert stretch.base is not None
    return stretch.base


METHODS.register(
    "ties",
    Method(
        "TIES-Merging (Yadav et al. 2023)",
        mix=ties,
        measure=thresholds,
        base=True,
        options={"density": 0.2, "average": True, "scale": 1.0},
        ranges={"density": (0, 1)},
    ),
)
