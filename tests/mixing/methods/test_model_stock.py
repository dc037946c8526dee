from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.mixing.methods import mix_tensors
from sphinx_pl.mixing.methods.model_stock import ratio

ROOT = math.sqrt(3)


@pytest.mark.parametrize(
    ("models", "base", "expected"),
    [
        # 60°: t = 2·½ / (1 + ½) = 2/3 of the average [1.5, √3/2]
        ([[2.0, 0.0], [1.0, ROOT]], [0.0, 0.0], [1.0, ROOT / 3]),
        # the same from another place
        ([[3.0, -1.0], [2.0, ROOT - 1]], [1.0, -1.0], [2.0, ROOT / 3 - 1]),
        # three that are 60° apart by two: t = 3·½ / (1 + 2·½) = 3/4 of [2/3, 2/3, 2/3]
        ([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]),
        ([[2.0, 0.0], [0.0, 5.0]], [0.0, 0.0], [0.0, 0.0]),  # 90°: nothing in common
        ([[3.0, 1.0], [-1.0, 1.0]], [1.0, 1.0], [1.0, 1.0]),  # 180°
        ([[2.0, 0.0], [4.0, 0.0]], [0.0, 0.0], [3.0, 0.0]),  # 0°: the average
        ([[4.0, 2.0], [1.0, 1.0]], [1.0, 1.0], [1.0, 1.0]),  # one that has learned nothing
    ],
)
def test_values_worked_by_hand(models: list[list[float]], base: list[float], expected: list[float]) -> None:
    tensors = [torch.tensor(model, dtype=torch.float64) for model in models]
    weights = [1 / len(models)] * len(models)
    mixed = mix_tensors("model_stock", tensors, weights, torch.tensor(base, dtype=torch.float64))
    assert mixed.tolist() == pytest.approx(expected, abs=1e-12)


def test_one_model_is_itself_and_equal_ones_are_too() -> None:
    base, tuned = (torch.randn(50, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    assert same_bits(mix_tensors("model_stock", [tuned], [1.0], base), tuned)
    assert same_bits(mix_tensors("model_stock", [tuned, tuned.clone()], [0.5, 0.5], base), tuned)
    assert same_bits(mix_tensors("model_stock", [base, base], [0.5, 0.5], base), base)


@given(cosine=st.floats(-1, 1), count=st.integers(1, 20))
def test_the_ratio_lies_between_the_base_and_the_average(cosine: float, count: int) -> None:
    assert 0 <= ratio(cosine, count) <= 1
    assert ratio(1.0, count) == 1
    assert ratio(0.0, count) == 0
    assert ratio(-1 / max(1, count - 1), count) == 0  # where the formula has a pole, for several


def test_scalars_are_parallel_or_opposite() -> None:
    base = torch.tensor(1.0)
    assert mix_tensors("model_stock", [torch.tensor(2.0), torch.tensor(4.0)], [0.5, 0.5], base).item() == 3.0
    assert mix_tensors("model_stock", [torch.tensor(2.0), torch.tensor(-4.0)], [0.5, 0.5], base).item() == 1.0
