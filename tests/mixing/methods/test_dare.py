from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.mixing.methods import CHUNK, METHODS, Stretch, mix_tensors, resolve_options
from sphinx_pl.mixing.methods.dare import drop
from sphinx_pl.mixing.mixer import Mixer
from tests.mixing.conftest import Held

COUNT = 3 * CHUNK + 1000


def kept_of(density: float, seed: int = 0, models: int = 1, key: str = "x", **options: Any) -> list[Tensor]:
    """What is kept of differences of 1, over several stretches."""
    chosen = resolve_options("dare", {"density": density, "seed": seed, **options})
    found = []
    for start in range(0, COUNT, CHUNK):
        size = min(CHUNK, COUNT - start)
        found.append(drop(Stretch([torch.ones(size)] * models, torch.zeros(size), key, start), chosen))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def test_the_kept_share_is_the_density_and_what_is_kept_is_scaled_up(subtests: pytest.Subtests) -> None:
    for density in (0.01, 0.2, 0.5, 0.9, 0.999):
        for seed in (0, 1, -7, 2**70):
            with subtests.test(density=density, seed=seed):
                (kept,) = kept_of(density, seed)
                share = float(kept.count_nonzero()) / COUNT
                assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / COUNT)
                assert set(kept.unique().tolist()) == {0.0, float(torch.ones(1) * (1 / density))}
                (plain,) = kept_of(density, seed, rescale=False)
                assert torch.equal(plain, (kept != 0).float())


@pytest.mark.parametrize("density", [0.1, 0.6])
def test_the_rescaled_difference_is_the_difference_on_average(density: float) -> None:
    delta = torch.linspace(-1, 2, 64).repeat(COUNT // 64)
    (kept,) = kept_of(density)
    mean = (kept[: len(delta)] * delta).view(-1, 64).double().mean(0)
    sigma = delta[:64].abs() * math.sqrt((1 - density) / density / (COUNT // 64))
    assert bool(((mean - delta[:64]).abs() <= 5 * sigma + 1e-12).all())


def test_what_is_drawn_differs_between_seeds_models_names_and_stretches() -> None:
    first, second = kept_of(0.5, models=2)
    others = [second, kept_of(0.5, seed=1)[0], kept_of(0.5, key="y")[0], first.roll(CHUNK)]
    for other in others:
        agree = float((first == other).double().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(COUNT)


def test_the_same_seed_gives_the_same_mixture() -> None:
    base, a, b = (torch.randn(5000, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    for name in ("dare", "dare_ties"):
        torch.manual_seed(1)
        one = mix_tensors(name, [a, b], [0.5, 0.5], base, seed=3)
        torch.manual_seed(2)
        assert same_bits(one, mix_tensors(name, [a, b], [0.5, 0.5], base, seed=3))
        assert not same_bits(one, mix_tensors(name, [a, b], [0.5, 0.5], base, seed=4))


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_the_mixer_draws_for_a_tensor_whatever_else_it_mixes_and_in_which_order(name: str) -> None:
    tensors = [torch.randn(CHUNK + 100, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    a, b, base = (Held({"other": t[:50].clone(), "x": t, "last": t.clone()}) for t in tensors)
    mixer = Mixer([a, b], {key: [0.6, 0.8] for key in a}, name, None, base)
    x, last = mixer.tensor("x"), mixer.tensor("last")
    other = Mixer([a, b], {key: [0.6, 0.8] for key in a}, name, None, base, watch=False)
    interleaved = [
        (one.clone(), two.clone())
        for one, two in zip(*(other.stretches(key, torch.float32) for key in ("last", "x")), strict=True)
    ]
    assert same_bits(torch.cat([two for _, two in interleaved]), x)
    assert same_bits(torch.cat([one for one, _ in interleaved]), last)
    assert not same_bits(x, last)


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_density_0_is_the_base_and_density_1_drops_nothing(name: str) -> None:
    base, a, b = (torch.randn(300, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3))
    assert same_bits(mix_tensors(name, [a, b], [0.5, 0.9], base, density=0.0), base)
    whole = mix_tensors(name, [a, b], [0.5, 0.9], base, density=1.0)
    plain = "task_arithmetic" if name == "dare" else "ties"
    options = {} if name == "dare" else {"density": 1.0}
    expected = mix_tensors(plain, [a, b], [0.5, 0.9], base, **options)
    assert torch.allclose(whole.float(), expected.float(), rtol=2**-7, atol=2**-20)


def test_values_worked_by_hand_from_what_was_drawn() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    a, b = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([2.0, 5.0, 0.0, 3.0])
    options = resolve_options("dare", {"density": 0.5})
    first, second = drop(Stretch([a, b], base, "", 0), options)
    # Kept entries are doubled: differences [2, 0, 1, -1] and [1, 4, -1, 2].
    assert all(x in (0, 2 * d) for x, d in zip(first.tolist(), [2, 0, 1, -1], strict=True))
    assert all(x in (0, 2 * d) for x, d in zip(second.tolist(), [1, 4, -1, 2], strict=True))
    mixed = mix_tensors("dare", [a, b], [0.5, 0.25], base, density=0.5)
    expected = [1 + 0.5 * x + 0.25 * y for x, y in zip(first.tolist(), second.tolist(), strict=True)]
    assert mixed.tolist() == expected


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**30), density=st.floats(0, 1))
def test_models_that_are_their_base_change_nothing(seed: int, density: float) -> None:
    base = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    for name in ("dare", "dare_ties"):
        assert same_bits(mix_tensors(name, [base, base], [0.5, 2.0], base, density=density), base)


def test_both_have_the_same_paper_and_ranges() -> None:
    assert METHODS["dare"].ranges == METHODS["dare_ties"].ranges
    assert METHODS["dare"].base
    assert METHODS["dare_ties"].base
