"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sphinx_pl.models.sphinx import whole_shape
from sphinx_pl.stages.adamw import AdamWBf16
from sphinx_pl.utils.config import within
from sphinx_pl.utils.errors import UserError, suggest

KINDS = ("adamw", "sgd")
MOMENTS = ("fp32", "bf16")


@dataclass
class OptimConfig:
    """An optimizer, and a schedule of linear warm-up and cosine decay.

    `warmup` counts steps, or is a share of all steps if it is below 1.

    `lr_scale`: factors of the whole schedule for some parts of the model (1 for the rest). `{clip:
    0.1}` lets a pretrained encoder change slowly.

    `kind`: adamw, or sgd (without momentum). sgd reveals gradients that are wrong by a factor,
    which Adam hides.

    `weight_decay` is AdamW's, separate from the gradient: a step removes the share
    `lr * weight_decay` of a weight.

    `moments`: the dtype of AdamW's moments: fp32 (more exactly, the dtype of the weights) or bf16
    (`AdamWBf16`).
    """

    kind: str = "adamw"
    moments: str = "fp32"
    lr: float = within(5e-5, above=0, at_most=1000)
    min_lr: float = within(0.0, at_least=0)
    warmup: float = within(0.0, at_least=0)
    betas: tuple[float, float] = within((0.9, 0.95), at_least=0, below=1)
    eps: float = within(1e-8, above=0)
    weight_decay: float = within(0.1, at_least=0, at_most=10)
    lr_scale: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"stage.optim.kind={self.kind}: {suggest(self.kind, KINDS)}")
        if self.moments not in MOMENTS:
            raise UserError(f"stage.optim.moments={self.moments}: {suggest(self.moments, MOMENTS)}")
        if self.kind == "sgd" and self.moments != "fp32":
            raise UserError(f"stage.optim.moments={self.moments}: sgd has no moments")
        for part, factor in self.lr_scale.items():
            if factor <= 0:
                raise UserError(
                    f"stage.optim.lr_scale.{part}={factor} must be positive: to freeze it, remove it from train_parts"
                )
        if self.min_lr > self.lr:
            raise UserError(f"stage.optim.min_lr={self.min_lr} must be between 0 and lr={self.lr}")


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Return the groups of decayed matrices and embeddings, and of vectors (norms, biases, start
    and end embeddings) without decay.

    The original excludes parameters by name, so it decays the LayerNorm weights of the projections.
    Here the shape decides.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad:
            (decayed if len(whole_shape(parameter)) >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_cosine(config: OptimConfig, max_steps: int) -> Callable[[int], float]:
    """Return the factor of `lr` at a step: linear warm-up from 0, then half a cosine down to
    `min_lr` at `max_steps`."""
    warmup = config.warmup * max_steps if config.warmup < 1 else config.warmup
    floor = config.min_lr / config.lr

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1.0, max_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def optimizer_groups(parts: Mapping[str, Iterable[nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Return the parameters of a model's `parts` that train, as two groups per learning rate (see
    `decay_groups`).

    A group stores its factor as "lr_scale".
    """
    rates: dict[float, list[nn.Parameter]] = {}
    for part, parameters in parts.items():
        rates.setdefault(config.lr_scale.get(part, 1.0), []).extend(parameters)
    return [
        {**group, "lr": config.lr * factor, "lr_scale": factor}
        for factor, parameters in rates.items()
        for group in decay_groups(parameters, config.weight_decay)
    ]


def build_optimizer(parts: Mapping[str, Iterable[nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer over `optimizer_groups`."""
    groups = optimizer_groups(parts, config)
    if config.kind == "sgd":
        return torch.optim.SGD(groups)
    betas = (config.betas[0], config.betas[1])
    if config.moments == "bf16":
        return AdamWBf16(groups, betas=betas, eps=config.eps)
    # one pass over the parameters, on CPUs too
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True)
