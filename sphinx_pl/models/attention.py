"""Which attention kernels training runs on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_as_on_gpus = False


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Choose as on a GPU, whatever the device is: for plans, which are made of tensors without memory."""
    global _as_on_gpus
    before, _as_on_gpus = _as_on_gpus, True
    try:
        yield
    finally:
        _as_on_gpus = before


@contextmanager
def training_kernel(device: torch.device) -> Iterator[None]:
    """On a CPU with gradients: SDPA as plain matmuls in its own precision; elsewhere PyTorch's choice.

    The CPU's fused kernel saves memory, but its backward pass is slower than plain matmuls for short rows.
    """
    if _as_on_gpus or device.type != "cpu" or not torch.is_grad_enabled():
        yield
        return
    # Of CPUs too, whatever its name says.
    before: bool = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], causal: bool = True) -> Tensor:
    """Scaled dot-product attention, [B, H, T, h] of [B, H, T, h] queries and [B, H, S, h] keys and values.

    Args:
        bias: added to the scores, broadcastable to [B, H, T, S]; every row attends to something.
        causal: where there is no bias and T > 1, which needs T = S; else every query attends to everything.
    """
    if bias is None or _as_on_gpus or q.device.type != "cpu" or not torch.is_grad_enabled():
        with training_kernel(q.device):
            causal = causal and bias is None and q.shape[2] > 1
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    # SDPA's plain matmuls also guard rows that attend to nothing, which costs as much as the softmax itself.
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    return torch.softmax(scores.add_(bias), dim=-1) @ v


def attention_weights(q_BHTh: Tensor, k_BKSh: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The weights of `attend`, [B, H, T, S] in float32, which fused kernels do not return.

    Args:
        bias: as for `attend`; None: every query attends to everything.
    """
    q_BKgTh = torch.unflatten(q_BHTh.float(), 1, (k_BKSh.shape[1], -1))
    scores = (q_BKgTh @ k_BKSh.float().transpose(-1, -2)[:, :, None]).flatten(1, 2) / math.sqrt(q_BHTh.shape[-1])
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)
