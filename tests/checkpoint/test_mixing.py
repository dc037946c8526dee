from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sphinx_pl.checkpoint.mixing import METHODS, check_weights, linear, mix_checkpoints, same_bits
from torch import Tensor

from sphinx_pl.checkpoint.format import open_checkpoint
from sphinx_pl.errors import UserError
from tests.checkpoint.conftest import PROCESSOR, random_tensors, small_config

Write = Callable[..., Path]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}

dtypes = st.sampled_from(DTYPES)
betas = st.floats(0, 1)


def any_bits(dtype: torch.dtype, seed: int) -> Tensor:
    """Random bit patterns, so every exponent, subnormals, zeros of both signs, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(BITS[dtype])
    bits = torch.randint(info.min, info.max, (2000,), generator=generator, dtype=BITS[dtype])
    values = bits.view(dtype)
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")], dtype=dtype)
    return values


def finite_bits(dtype: torch.dtype, seed: int) -> Tensor:
    values = any_bits(dtype, seed)
    return torch.where(values.isfinite(), values, torch.ones_like(values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [0.2, 0.3, 0.5], [1.5, -0.5]])
def test_equals_float64_rounded_once(dtype: torch.dtype, weights: list[float]) -> None:
    tensors = [torch.randn(37, 1009, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(len(weights))]
    exact = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    assert isinstance(exact, Tensor)
    assert same_bits(linear(tensors, weights), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_representable_number_lies_closer_to_the_exact_sum(dtype: torch.dtype) -> None:
    a, b = (torch.randn(500, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    mixed = linear(
        [a, b], [0.3125, 0.6875]
    )  # exact in binary, so near-ties are not decided by the weights' own rounding
    up = torch.full_like(mixed, float("inf")), torch.full_like(mixed, float("-inf"))
    neighbours = [torch.nextafter(mixed.float(), u.float()) for u in up] if dtype == torch.float32 else _next(mixed)
    for i in range(len(a)):
        exact = Fraction(0.3125) * Fraction(a[i].item()) + Fraction(0.6875) * Fraction(b[i].item())
        error = abs(Fraction(mixed[i].item()) - exact)
        assert all(error <= abs(Fraction(n[i].item()) - exact) for n in neighbours)


def _next(values: Tensor) -> list[Tensor]:
    bits = values.view(torch.int16)  # none of the values is 0 or the largest
    return [(bits + 1).view(values.dtype), (bits - 1).view(values.dtype)]


@settings(deadline=None)
@given(dtype=dtypes, seeds=st.tuples(st.integers(0, 2**30), st.integers(0, 2**30)))
def test_the_ends_give_back_the_inputs(dtype: torch.dtype, seeds: tuple[int, int]) -> None:
    a, b = (any_bits(dtype, seed) for seed in seeds)
    assert same_bits(linear([a, b], [1.0, 0.0]), a)
    assert same_bits(linear([a, b], [0.0, 1.0]), b)


@settings(deadline=None)
@given(dtype=dtypes, seed=st.integers(0, 2**30), beta=betas)
def test_equal_inputs_give_themselves(dtype: torch.dtype, seed: int, beta: float) -> None:
    a = any_bits(dtype, seed)
    assert same_bits(linear([a, a.clone()], [beta, 1 - beta]), a)
    assert same_bits(linear([a, a.clone(), a.clone()], [beta / 2, beta / 2, 1 - beta]), a)


@settings(deadline=None)
@given(dtype=dtypes, seeds=st.tuples(st.integers(0, 2**30), st.integers(0, 2**30)), beta=betas)
def test_the_order_of_two_does_not_matter_and_the_mixture_lies_between(
    dtype: torch.dtype, seeds: tuple[int, int], beta: float
) -> None:
    a, b = (finite_bits(dtype, seed) for seed in seeds)
    mixed = linear([a, b], [beta, 1 - beta])
    assert same_bits(mixed, linear([b, a], [1 - beta, beta]))
    if dtype != torch.float64:  # there the sum itself rounds, by up to an ulp
        assert bool(((torch.minimum(a, b) <= mixed) & (mixed <= torch.maximum(a, b))).all())


def test_inputs_are_left_alone_and_never_aliased() -> None:
    a, b = torch.ones(3), torch.zeros(3)
    linear([a, b], [1.0, 0.0]).fill_(7)
    linear([a, a], [0.5, 0.5]).fill_(7)
    assert a.tolist() == [1, 1, 1]
    assert torch.equal(linear([torch.ones(4, 2).T, torch.zeros(2, 4)], [0.25, 0.75]), torch.full((2, 4), 0.25))


def test_chunks_cover_a_tensor_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinx_pl.checkpoint.mixing._CHUNK", 7)
    a, b = torch.arange(100.0), torch.arange(100.0) * 3
    assert torch.equal(linear([a, b], [0.5, 0.5]), torch.arange(100.0) * 2)


@pytest.mark.parametrize(
    ("weights", "normalize", "message"),
    [
        ([0.5], False, "1 numbers for 2 checkpoints"),
        ([0.5, 0.6], False, "sum to 1.1, not 1"),
        ([0.5, 0.5 + 2e-6], False, "normalize=true"),
        ([float("nan"), 0.5], False, "finite"),
        ([1.0, -1.0], True, "sum to 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: list[float], normalize: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_weights(weights, 2, normalize)


def test_weights_are_normalized() -> None:
    assert check_weights([1, 3], 2, normalize=True) == [0.25, 0.75]
    assert sum(check_weights([0.3333333, 0.6666666], 2)) == pytest.approx(1, abs=1e-15)


def test_mixing_whole_checkpoints(write: Write, tmp_path: Path) -> None:
    a, b = (open_checkpoint(write(name, seed)) for name, seed in (("a", 0), ("b", 1)))
    mix_checkpoints([a, b], [1, 3], tmp_path / "out", normalize=True, config={"out": "out"}, progress=False)
    out = open_checkpoint(tmp_path / "out")
    for name in ("decoder.a", "decoder.b", "decoder.c", "decoder.scalar"):
        exact = 0.25 * a.tensor(name).double() + 0.75 * b.tensor(name).double()
        assert same_bits(out.tensor(name), exact.to(a.info(name).dtype)), name
    assert out.tensor("mixer.towers.clip.steps").tolist() == [0, 1, 2, 3]
    assert out.config == a.config
    assert out.tokenizer_file.read_bytes() == b"pieces"
    assert out.provenance["mixing"] == {"method": "linear", "weights": [0.25, 0.75]}
    assert out.provenance["parents"] == [a.identity(), b.identity()]
    assert out.provenance["config"] == {"out": "out"}


def _with(name: str, value: Tensor) -> dict[str, Tensor]:
    return random_tensors(1) | {name: value}


def _without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in random_tensors(1).items() if key != name}


NAN = torch.full((5, 7), 1.0)
NAN[2, 3] = float("nan")


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"model": small_config(rope_theta=5e5).to_dict()}, ["model.decoder.rope_theta", "10000.0", "500000.0"]),
        ({"processor": PROCESSOR | {"decimals": 2}}, ["processor.decimals"]),
        ({"tokenizer": b"other pieces"}, ["different tokenizers"]),
        ({"tensors": _without("decoder.b")}, ["missing: 'decoder.b'"]),
        ({"tensors": _with("decoder.extra", torch.zeros(1))}, ["unexpected: 'decoder.extra'"]),
        ({"tensors": _with("decoder.a", torch.zeros(7, 5))}, ["'decoder.a' is [7, 5] instead of [5, 7]"]),
        ({"tensors": _with("decoder.a", torch.zeros(5, 7).half())}, ["'decoder.a'", "float32", "float16"]),
        ({"tensors": _with("decoder.a", NAN)}, ["'decoder.a'", "NaN"]),
        ({"tensors": _with("decoder.a", NAN.fill_(float("inf")).clone())}, ["'decoder.a'", "infinite"]),
        ({"tensors": _with("mixer.towers.clip.steps", torch.zeros(4).long())}, ["steps", "integers"]),
    ],
)
def test_checkpoints_that_do_not_go_together_are_refused(
    write: Write, tmp_path: Path, other: dict[str, Any], names: list[str]
) -> None:
    options = {"tensors": 1} | other
    a, b = write("a", 0), write("b", **options)
    with pytest.raises(UserError) as error:
        mix_checkpoints([open_checkpoint(a), open_checkpoint(b)], [0.5, 0.5], tmp_path / "out", progress=False)
    message = str(error.value)
    assert "\n" not in message
    assert str(b) in message or "integers" in message
    assert all(name in message for name in names), message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()


def test_names_and_weight_sources_may_differ(write: Write, tmp_path: Path) -> None:
    renamed = small_config().to_dict() | {"name": "other"}
    checkpoints = [open_checkpoint(write("a", 0)), open_checkpoint(write("b", 1, model=renamed))]
    out = mix_checkpoints(checkpoints, [0.5, 0.5], tmp_path / "out", progress=False)
    assert json.loads((out / "config.json").read_text())["model"]["name"] == "small"


def test_an_overflow_is_refused(write: Write, tmp_path: Path) -> None:
    large = [{"t": torch.tensor([sign * 60000.0]).half()} for sign in (1, -1)]
    checkpoints = [open_checkpoint(write(name, values)) for name, values in zip("ab", large, strict=True)]
    with pytest.raises(UserError, match=r"'t' overflows torch.float16"):
        mix_checkpoints(checkpoints, [1.5, -0.5], tmp_path / "out", progress=False)


def test_other_refusals(write: Write, tmp_path: Path) -> None:
    a = open_checkpoint(write("a", 0))
    with pytest.raises(UserError, match="exists"):
        mix_checkpoints([a, a], [0.5, 0.5], a.path, progress=False)
    with pytest.raises(UserError, match="at least two"):
        mix_checkpoints([a], [1.0], tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="did you mean 'linear'"):
        mix_checkpoints([a, a], [0.5, 0.5], tmp_path / "out", method="linaer", progress=False)
    assert METHODS["linear"] is linear
