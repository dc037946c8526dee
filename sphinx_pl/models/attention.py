"""Which attention kernel training runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def training_kernel(device: torch.device) -> Iterator[None]:
    """On a CPU with gradients: SDPA as plain matmuls in its own precision; elsewhere PyTorch's choice.

    The CPU's fused kernel saves memory, but its backward pass is slower than plain matmuls for short rows.
    """
    if device.type != "cpu" or not torch.is_grad_enabled():
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
