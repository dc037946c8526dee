"""Gradients as this process holds them, whole or in part: their norms by part of the model, and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """What this process holds of a gradient: all of it, its rows under FSDP2, its flat partition under ZeRO-3."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter)  # type: ignore[no-any-return]
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether other ranks hold other parts of it."""
    return hasattr(parameter, "ds_id") or isinstance(parameter, DTensor)


def _norm(gradient: Tensor | None) -> Tensor | None:
    """Summed in float32, whatever the gradient's dtype."""
    if gradient is None or not gradient.numel():
        return None
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm


def norms(parts: Mapping[str, Sequence[nn.Parameter]]) -> tuple[float, dict[str, float]]:
    """The global norm of all gradients and those of the parts that train; all ranks call it together.

    One number after another is read from the device at the end, once for each step.
    """
    training = {part: [p for p in parameters if p.requires_grad] for part, parameters in parts.items()}
    training = {part: parameters for part, parameters in training.items() if parameters}
    squares, sharded = [], False
    for parameters in training.values():
        # One at a time: DeepSpeed gives bf16 gradients as float32 copies, which together take 4 bytes a parameter.
        local = [norm for p in parameters if (norm := _norm(local_gradient(p))) is not None]
        sharded |= any(is_sharded(p) for p in parameters)
        total = torch.linalg.vector_norm(torch.stack(local)) if local else torch.zeros(())
        squares.append(total.double().square().to(parameters[0].device))
    together = torch.stack(squares)
    if sharded:
        dist.all_reduce(together)
    values = together.tolist()
    return math.sqrt(sum(values)), {part: math.sqrt(value) for part, value in zip(training, values, strict=True)}


@torch.no_grad()
def scale(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply the gradients in place. (ZeRO-3 clips by itself.)"""
    local = [gradient for p in parameters if p.grad is not None and (gradient := local_gradient(p)) is not None]
    if local:
        torch._foreach_mul_(local, factor)
