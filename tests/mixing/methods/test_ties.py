from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.mixing.methods import mix_tensors
from sphinx_pl.mixing.methods.ties import elect, kth_largest
from tests.mixing.conftest import finite_bits

# With density 0.4 the two largest of each stay: [5, -4, 0, 0, 0] and [0, -6, 4, 0, 0].
A = torch.tensor([5.0, -4.0, 3.0, 0.5, 0.0])
B = torch.tensor([-1.0, -6.0, 4.0, 0.25, 2.0])


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        ([1.0, 1.0], {}, [5.0, -5.0, 4.0, 0.0, 0.0]),  # only (4 + 6) / 2 has two to average
        ([1.0, 1.0], {"average": False}, [5.0, -10.0, 4.0, 0.0, 0.0]),
        ([1.0, 1.0], {"scale": 0.5}, [2.5, -2.5, 2.0, 0.0, 0.0]),
        ([1.0, 0.5], {"average": False}, [5.0, -7.0, 2.0, 0.0, 0.0]),
        ([1.0, 0.5], {}, [5.0, -7.0 / 1.5, 4.0, 0.0, 0.0]),
        ([2.0, 0.0], {}, [5.0, -4.0, 0.0, 0.0, 0.0]),
    ],
)
def test_values_worked_by_hand(weights: list[float], options: dict[str, float], expected: list[float]) -> None:
    for base in (torch.zeros(5), torch.tensor([8.0, -4.0, 2.0, 1.0, 16.0])):
        mixed = mix_tensors("ties", [A + base, B + base], weights, base, torch.float64, density=0.4, **options)
        assert (mixed - base).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("entries", "weights", "expected"),
    [
        ([3.0, -2.0], [1, 1], 3.0),  # the larger one's sign
        ([3.0, -2.0], [1, 2], -2.0),  # of more weight
        ([3.0, 1.0, -5.0], [1, 1, 1], -5.0),
        ([3.0, 3.0, -5.0], [1, 1, 1], 3.0),
        ([2.0, -2.0], [1, 1], 2.0),  # they cancel: plus, as in the authors' code
        ([0.0, -2.0], [1, 1], -2.0),  # what was trimmed has no vote and is not averaged
        ([0.0, 0.0], [1, 1], 0.0),
        ([2.0, -1.0], [1, -1], 3.0),  # plus both times, and weights that cancel: the sum
    ],
)
def test_the_election_worked_by_hand(entries: list[float], weights: list[float], expected: float) -> None:
    assert elect([torch.tensor([entry]) for entry in entries], weights, average=True).item() == expected


def test_one_model_of_any_weight_is_its_own_mean() -> None:
    """The weight that it is multiplied by is the one that it is divided by, in all its digits."""
    tuned = torch.randn(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = elect([tuned], [0.6], average=True)
    assert torch.allclose(found, tuned, rtol=1e-15, atol=0)


def test_density_0_is_the_base_and_density_1_trims_nothing() -> None:
    base = finite_bits(torch.bfloat16, 0)
    base[base.abs() > 1e30] = 1
    tuned = base + torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(mix_tensors("ties", [tuned], [1.0], base, density=0.0), base)
    exact = base.double() + (tuned.double() - base.double())
    assert torch.equal(mix_tensors("ties", [tuned], [1.0], base, torch.float64, density=1.0), exact.bfloat16())


def test_all_entries_that_equal_the_last_one_kept_are_kept() -> None:
    deltas = torch.tensor([1.0, -1.0, 1.0, 0.5, -1.0, 2.0])
    mixed = mix_tensors("ties", [deltas], [1.0], torch.zeros(6), density=0.5)
    assert mixed.tolist() == [1.0, -1.0, 1.0, 0.0, -1.0, 2.0]


def test_one_entry_at_least_is_kept() -> None:
    assert mix_tensors("ties", [torch.tensor(3.0)], [1.0], torch.tensor(1.0), density=0.2).item() == 3.0
    assert mix_tensors("ties", [torch.tensor(3.0)], [1.0], torch.tensor(1.0), density=0.0).item() == 1.0


def test_models_that_are_their_base_change_nothing() -> None:
    base = finite_bits(torch.bfloat16, 3)
    mixed = mix_tensors("ties", [base, base], [0.5, 0.7], base)
    assert torch.equal(mixed, base)


def pieces_of(values: Tensor, sizes: list[int]) -> Iterable[Tensor]:
    start = 0
    for size in [*sizes, len(values)]:
        yield values[start : start + size]
        start += size


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**30),
    count=st.integers(1, 400),
    sizes=st.lists(st.integers(0, 50), max_size=5),
    data=st.data(),
)
def test_kth_largest_is_what_sorting_finds(
    dtype: torch.dtype, seed: int, count: int, sizes: list[int], data: st.DataObject
) -> None:
    values = finite_bits(dtype, seed, 400)[:count].abs()
    values = values[torch.randint(len(values), values.shape, generator=torch.Generator().manual_seed(seed))]  # equals
    k = data.draw(st.integers(1, count))
    expected = values.sort(descending=True).values[k - 1].item()
    assert kth_largest(lambda: pieces_of(values, sizes), k) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_largest_of_numbers_that_differ_in_the_last_bit_only(dtype: torch.dtype) -> None:
    kind = torch.int32 if dtype == torch.float32 else torch.int64
    one = torch.ones(1, dtype=dtype).view(kind)
    values = (one + torch.randperm(1000, generator=torch.Generator().manual_seed(0))).to(kind).view(dtype)
    ordered = values.sort(descending=True).values.tolist()
    assert [kth_largest(lambda: [values], k) for k in range(1, 1001, 37)] == ordered[::37]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_largest_of_zeros_infinities_and_one_value(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, float("inf"), 0.0, 5e-324, 1.0], dtype=dtype)
    ordered = values.sort(descending=True).values.tolist()
    assert [kth_largest(lambda: [values], k) for k in range(1, 6)] == ordered
    assert kth_largest(lambda: [torch.full((9,), 3.5, dtype=dtype)], 4) == 3.5


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**30), density=st.floats(0, 1))
def test_as_many_are_kept_as_the_density_says(seed: int, density: float) -> None:
    deltas = torch.randperm(997, generator=torch.Generator().manual_seed(seed)) + 1.0
    mixed = mix_tensors("ties", [deltas], [1.0], torch.zeros(997), density=density)
    kept = int(mixed.count_nonzero())
    assert kept == (max(1, int(density * 997)) if density else 0)
    assert same_bits(mixed.sort(descending=True).values[:kept], deltas.sort(descending=True).values[:kept])
