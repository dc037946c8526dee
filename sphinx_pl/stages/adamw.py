"""AdamW (Loshchilov & Hutter 2019) with bf16 moments, which take 4 bytes less per parameter than
float32 moments.

A bf16 number has 8 bits. Rounding to the nearest number would always lose an update below half a
unit of the last bit. Stochastic rounding (up with the probability that the value lies above the
lower neighbour; Gupta et al. 2015, section 3) is right on average. This holds for the moments, and
for weights that are bf16 themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

CHUNK = 2**24
"""Elements in float32 at a time.

It limits the memory of a step beside weights, gradients and moments.
"""


def round_stochastically(values: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Write float32 `values` to `out` as bf16 neighbours whose mean is the value.

    A float32 `out` gets exact values.

    Infinity and not-a-number stay what they are.
    """
    if out.dtype != torch.bfloat16:
        out.copy_(values)
        return
    # bf16 is the upper half of float32. Noise in the lower half carries over with the right
    # probability.
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    out.copy_(noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32))


class AdamWBf16(torch.optim.Optimizer):
    """`torch.optim.AdamW` with moments in bf16; arithmetic is float32.

    The noise of a step follows from the step's number. So a resumed run continues exactly, and
    ranks with the same weights (DDP) keep them the same.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # casts moments to the weights' dtype
        for state in self.state.values():
            state.update({name: state[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                _update(parameter, state, group, number)
        return loss


def _update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any], number: int) -> None:
    (beta1, beta2), step, lr = group["betas"], int(state["step"]), group["lr"]
    tensors = [_flat(t) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
    generator = torch.Generator(tensors[0].device).manual_seed(step * 1_000_003 + number)
    for weight, gradient, mean, square in zip(*(torch.split(t, CHUNK) for t in tensors), strict=True):
        gradient = gradient.float()
        m = mean.float().lerp_(gradient, 1 - beta1)
        v = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        round_stochastically(m, mean, generator)
        round_stochastically(v, square, generator)
        spread = v.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        w = weight.float().mul_(1 - lr * group["weight_decay"])
        round_stochastically(w.addcdiv_(m, spread, value=-lr / (1 - beta1**step)), weight, generator)


def _flat(tensor: Any) -> Tensor:
    """Return the part of the tensor that this process holds, flattened."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)
