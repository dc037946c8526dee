"""DARE: random entries of each model's difference to the base are dropped, the rest scaled."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.mixing.methods import METHODS, Method, Options, Stretch, Weights
from sphinx_pl.mixing.methods.ties import elect

DRAWN = 1 << 16
"""Random numbers that are drawn with one seed."""


def uniform(label: str, start: int, count: int) -> Tensor:
    """Numbers `start` to `start + count` of an endless row in [0, 1) that `label` names."""
    pieces = []
    for block in range(start // DRAWN, -(-(start + count) // DRAWN)):
        seed = int.from_bytes(hashlib.sha256(f"{label} {block}".encode()).digest()[:8], "little", signed=True)
        pieces.append(torch.rand(DRAWN, generator=torch.Generator().manual_seed(seed)))
    drawn = torch.cat(pieces) if pieces else torch.empty(0)
    return drawn[start % DRAWN :][:count]


def drop(stretch: Stretch, options: Options) -> list[Tensor]:
    """The differences, of which each entry is kept with the probability `density` and divided by
    it.

    What is drawn follows from the seed, the tensor's name (in its file), the model's place and the
    entry's: not from threads or the order of work.
    """
    density, kept = options["density"], []
    for model, delta in enumerate(stretch.deltas()):
        drawn = uniform(f"{options['seed']} {stretch.key} {model}", stretch.start, len(delta))
        rescale = 1 / density if options["rescale"] and density else 1.0
        kept.append(torch.where(drawn < density, delta * rescale, 0))
    return kept


def dare(stretch: Stretch, weights: Weights, options: Options, measured: Any) -> Tensor:
    """base + Σ λᵢ·(what is kept of θᵢ - base)."""
    assert stretch.base is not None
    kept = [part * weight for part, weight in zip(drop(stretch, options), weights, strict=True)]
    return torch.stack([stretch.base, *kept]).sum(0)


def dare_ties(stretch: Stretch, weights: Weights, options: Options, measured: Any) -> Tensor:
    """The same with TIES' election of signs in place of the plain sum."""
    assert stretch.base is not None
    scale: float = options["scale"]
    return stretch.base + elect(drop(stretch, options), weights, options["average"]) * scale


PAPER = "Language models are super Mario (Yu et al. 2024)"
OPTIONS: dict[str, float | int | bool] = {"density": 0.5, "rescale": True, "seed": 0}
RANGES = {"density": (0.0, 1.0)}

METHODS.register("dare", Method(PAPER, mix=dare, base=True, options=OPTIONS, ranges=RANGES))
METHODS.register(
    "dare_ties",
    Method(PAPER, mix=dare_ties, base=True, options={**OPTIONS, "average": True, "scale": 1.0}, ranges=RANGES),
)
