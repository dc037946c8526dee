from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.mixing.methods import METHODS, mix_tensors
from sphinx_pl.mixing.methods.linear import ema_weights, equal_weights
from tests.mixing.conftest import BITS


def test_values_worked_by_hand() -> None:
    a, b, c = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 6.0]), torch.tensor([10.0, 0.5])
    assert mix_tensors("linear", [a, b], [0.25, 0.75]).tolist() == [2.5, 4.0]
    assert mix_tensors("linear", [a, b], [1.5, -0.5]).tolist() == [0.0, -6.0]
    assert mix_tensors("linear", [a, b, c], [0.5, 0.25, 0.25]).tolist() == [3.75, 0.625]
    assert mix_tensors("linear", [a, b], [1, 1]).tolist() == [4.0, 4.0]


def test_each_methods_own_weights_worked_by_hand() -> None:
    assert equal_weights(4, {}) == [0.25] * 4
    assert ema_weights(1, {"decay": 0.5}) == [1.0]
    assert ema_weights(3, {"decay": 0.5}) == [0.25, 0.25, 0.5]
    assert ema_weights(3, {"decay": 0.0}) == [0.0, 0.0, 1.0]  # the last one alone
    assert ema_weights(3, {"decay": 1.0}) == [1.0, 0.0, 0.0]  # the first one alone
    assert METHODS["linear"].weights is None


@settings(deadline=None)  # a busy machine is no failure
@given(count=st.integers(1, 30), decay=st.floats(0, 1))
def test_the_weights_of_a_moving_average_are_those_of_its_recursion(count: int, decay: float) -> None:
    weights = ema_weights(count, {"decay": decay})
    expected = [1.0]
    for _ in range(count - 1):
        expected = [*(decay * weight for weight in expected), 1 - decay]
    assert weights == pytest.approx(expected, abs=1e-12)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_representable_number_lies_closer_to_the_exact_sum(dtype: torch.dtype) -> None:
    a, b = (torch.randn(500, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    mixed = mix_tensors("linear", [a, b], [0.3125, 0.6875], arithmetic=torch.float64)  # weights exact in binary
    bits = mixed.view(BITS[dtype])  # none of the values is 0 or the largest
    neighbours = [(bits + step).view(dtype) for step in (1, -1)]
    for i in range(len(a)):
        exact = Fraction(0.3125) * Fraction(a[i].item()) + Fraction(0.6875) * Fraction(b[i].item())
        error = abs(Fraction(mixed[i].item()) - exact)
        assert all(error <= abs(Fraction(n[i].item()) - exact) for n in neighbours)


def test_what_has_no_weight_may_be_no_number() -> None:
    a, broken = torch.tensor([1.0, -0.0]), torch.tensor([math.nan, math.inf])
    assert same_bits(mix_tensors("linear", [a, broken], [1.0, 0.0]), a)
    assert mix_tensors("linear", [a, broken, a], [0.5, 0.0, 0.5]).tolist() == [1.0, 0.0]


def test_zeros_keep_their_sign_only_where_they_agree() -> None:
    zeros = torch.tensor([0.0, -0.0, -0.0]), torch.tensor([0.0, 0.0, -0.0])
    assert same_bits(mix_tensors("linear", zeros, [0.5, 0.5]), torch.tensor([0.0, 0.0, -0.0]))
