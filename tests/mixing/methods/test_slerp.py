from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sphinx_pl.mixing.methods import mix_tensors
from sphinx_pl.mixing.methods.slerp import PARALLEL, slerp_coefficients

HALF = math.sqrt(0.5)


def slerp(a: Tensor, b: Tensor, beta: float) -> list[float]:
    mixed: list[float] = mix_tensors("slerp", [a.double(), b.double()], [beta, 1 - beta]).tolist()
    return mixed


@pytest.mark.parametrize(
    ("a", "b", "beta", "expected"),
    [
        ([1.0, 0.0], [0.0, 1.0], 0.5, [HALF, HALF]),  # sin 45° / sin 90° each
        ([2.0, 0.0], [0.0, 1.0], 0.5, [2 * HALF, HALF]),  # lengths stay as they are
        ([1.0, 0.0], [0.5, math.sqrt(0.75)], 0.25, [HALF, HALF]),  # 60° apart, three quarters of the way: 45°
        ([1.0, 0.0], [0.0, 1.0], 1 / 3, [0.5, math.sqrt(0.75)]),  # two thirds of the way: 60°
        ([1.0, 0.0], [-HALF, HALF], 1 / 3, [0.0, 1.0]),  # 135° apart, two thirds of the way: 90°
    ],
)
def test_values_worked_by_hand(a: list[float], b: list[float], beta: float, expected: list[float]) -> None:
    assert slerp(torch.tensor(a), torch.tensor(b), beta) == pytest.approx(expected, abs=1e-7)


def test_weights_beyond_the_ends_go_on_along_the_arc() -> None:
    # 45° apart, twice the way: 90°
    assert slerp(torch.tensor([1.0, 0.0]), torch.tensor([HALF, HALF]), -1) == pytest.approx([0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [2.0, 4.0], [1.75, 3.5]),  # parallel
        ([1.0, 0.0], [-1.0, 0.0], [-0.5, 0.0]),  # antiparallel: there is no one arc
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_without_an_arc_it_is_linear(a: list[float], b: list[float], expected: list[float]) -> None:
    assert slerp(torch.tensor(a), torch.tensor(b), 0.25) == expected


def test_a_zero_tensor_is_at_a_right_angle_to_all() -> None:
    mixed = mix_tensors("slerp", [torch.zeros(2), torch.tensor([2.0, 4.0])], [0.5, 0.5])
    assert mixed.tolist() == pytest.approx([2 * HALF, 4 * HALF])


def test_scalars_are_parallel_or_opposite() -> None:
    assert mix_tensors("slerp", [torch.tensor(2.0), torch.tensor(4.0)], [0.5, 0.5]).item() == 3.0
    assert mix_tensors("slerp", [torch.tensor(2.0), torch.tensor(-4.0)], [0.5, 0.5]).item() == -1.0


@given(cosine=st.floats(-1, 1), beta=st.floats(0, 1))
def test_the_coefficients_of_unit_vectors_give_a_unit_vector(cosine: float, beta: float) -> None:
    first, second = slerp_coefficients(cosine, [beta, 1 - beta])
    if abs(cosine) <= PARALLEL:
        length = first * first + second * second + 2 * first * second * cosine
        assert length == pytest.approx(1, abs=1e-6)
    else:
        assert [first, second] == [beta, 1 - beta]


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_arc_and_chord_meet_where_one_replaces_the_other(beta: float) -> None:
    arc = slerp_coefficients(PARALLEL, [beta, 1 - beta])
    assert arc != [beta, 1 - beta]
    assert arc == pytest.approx([beta, 1 - beta], rel=2e-4)


@settings(deadline=None)
@given(seeds=st.tuples(st.integers(0, 2**30), st.integers(0, 2**30)), beta=st.floats(0, 1))
def test_the_way_along_the_arc_is_the_share_of_the_other(seeds: tuple[int, int], beta: float) -> None:
    a, b = (torch.randn(64, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds)
    a, b = a / a.norm(), b / b.norm()
    mixed = mix_tensors("slerp", [a, b], [beta, 1 - beta])
    angle = math.acos(max(-1.0, min(1.0, float(a @ b))))
    if math.cos(angle) < PARALLEL:
        assert float(mixed.norm()) == pytest.approx(1)
        assert float(mixed @ a) == pytest.approx(math.cos((1 - beta) * angle), abs=1e-9)


def test_the_angle_is_that_of_all_elements_whatever_their_size() -> None:
    a, b = torch.tensor([1e-30, 0.0]), torch.tensor([0.0, 1e-30])  # whose squares float32 does not hold
    assert mix_tensors("slerp", [a, b], [0.5, 0.5]).tolist() == pytest.approx([1e-30 * HALF] * 2, rel=1e-6)
    large = mix_tensors("slerp", [a * 1e30 * 1e30, b * 1e30 * 1e30], [0.5, 0.5])
    assert large.tolist() == pytest.approx([1e30 * HALF] * 2, rel=1e-6)
