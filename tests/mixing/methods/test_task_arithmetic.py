from __future__ import annotations

import pytest
import torch

from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.mixing.methods import mix_tensors

BASE = torch.tensor([1.0, 2.0])
A, B = torch.tensor([3.0, 2.0]), torch.tensor([1.0, 6.0])


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.5, 0.25], [2.0, 3.0]),  # [1, 2] + 0.5·[2, 0] + 0.25·[0, 4]
        ([1.0, 1.0], [3.0, 6.0]),  # both in full
        ([-1.0, 0.0], [-1.0, 2.0]),  # the first one forgotten
        ([2.0, 0.5], [5.0, 4.0]),
    ],
)
def test_values_worked_by_hand(weights: list[float], expected: list[float]) -> None:
    assert mix_tensors("task_arithmetic", [A, B], weights, BASE).tolist() == expected


def test_one_model_is_scaled_beyond_itself() -> None:
    assert mix_tensors("task_arithmetic", [A], [1.5], BASE).tolist() == [4.0, 2.0]


def test_a_small_model_survives_a_large_base() -> None:
    base, tuned = torch.full((3,), 60000.0), torch.tensor([1e-3, -1e-8, 0.0])
    assert same_bits(mix_tensors("task_arithmetic", [tuned], [1.0], base), tuned)
    assert not same_bits(base + (tuned - base), tuned)


def test_models_that_are_their_base_change_nothing() -> None:
    base = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert same_bits(mix_tensors("task_arithmetic", [base, base], [0.3, 0.9], base), base)
