"""The decoder's attention against PyTorch's, with gradients, for every way in which masks arise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sphinx_pl.models.attention import attend, attention_weights


@pytest.mark.parametrize("mask", ["none", "causal", "two samples in a row"])
def test_attend_equals_sdpa_with_gradients(mask: str) -> None:
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    allowed = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    if mask == "two samples in a row":
        allowed[1, :, 3:, :3] = False
    bias = None if mask == "none" else torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (queries, keys, values))
    found = attend(queries, keys, values, bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), (queries, keys, values)), wanted)


def test_attend_keeps_the_autocast_dtype() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(q, k, v, torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_attention_weights_are_those_that_attend_weights_the_values_with() -> None:
    torch.manual_seed(0)
    queries = torch.randn(2, 6, 4, 8)
    keys, values = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    bias = torch.zeros(2, 1, 4, 7).masked_fill(~torch.ones(4, 7, dtype=torch.bool).tril(3), -math.inf)
    whole_keys, whole_values = (t.repeat_interleave(2, dim=1) for t in (keys, values))
    for masked in (bias, None):
        weights = attention_weights(queries, keys, masked)
        expected = attend(queries, whole_keys, whole_values, masked, causal=False)
        torch.testing.assert_close(weights @ whole_values, expected)
