"""The gradients of this process, whole or in part: norms by part, and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return this process's part of a gradient: all of it, its rows under FSDP2, or its flat
    partition under ZeRO-3."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter)  # type: ignore[no-any-return]
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether other ranks hold other parts of the parameter."""
    return hasattr(parameter, "ds_id") or isinstance(parameter, DTensor)


def _norm(gradient: Tensor | None) -> Tensor | None:
    """Return the norm, summed in float32 whatever the gradient's dtype."""
    if gradient is None or not gradient.numel():
        return None
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm


def norms(parts: Mapping[str, Sequence[nn.Parameter]]) -> tuple[float, dict[str, float]]:
    """Return the global norm of all gradients, and the norms of the parts that train.

    All ranks call it together.

    The numbers are read from the device once per step, at the end.
    """
    training = {part: [p for p in parameters if p.requires_grad] for part, parameters in parts.items()}
    training = {part: parameters for part, parameters in training.items() if parameters}
    squares, sharded = [], False
    for parameters in training.values():
        # DeepSpeed returns bf16 gradients as float32 copies, which together would take 4 bytes per
        # parameter. So they are handled one at a time.
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
    """Multiply the gradients in place. ZeRO-3 does its own clipping."""
    local = [gradient for p in parameters if p.grad is not None and (gradient := local_gradient(p)) is not None]
    if local:
        torch._foreach_mul_(local, factor)
