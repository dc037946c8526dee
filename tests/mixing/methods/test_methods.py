"""What holds for all methods or several of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sphinx_pl.mixing.methods as package
from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.mixing.methods import METHODS, combine_, mix_tensors, resolve_options, round_once
from sphinx_pl.utils.errors import UserError
from tests.mixing.conftest import BITS, PRECISE, finite_bits, rounded_once

HALF = [torch.float16, torch.bfloat16]
dtypes = st.sampled_from([*HALF, torch.float32])
betas = st.floats(0, 1)
seeds = st.integers(0, 2**30)
scales = st.floats(-2, 2)
few = settings(deadline=None, max_examples=50)


def test_every_file_of_the_folder_registers_a_method() -> None:
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__"}
    functions = [method.mix or method.coefficients for method in METHODS.values()]
    assert files == {function.__module__.rpartition(".")[2] for function in functions if function is not None}


def test_a_method_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown mixing method 'linaer': did you mean 'linear'"):
        resolve_options("linaer", {})


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_own_options_are_in_their_ranges(name: str) -> None:
    method = METHODS[name]
    assert resolve_options(name, {}) == dict(method.options)
    assert resolve_options(name, method.options) == dict(method.options)
    assert set(method.ranges) <= set(method.options)
    assert method.paper


def test_options_are_completed() -> None:
    found = resolve_options("dare", {"density": 1, "rescale": None})
    assert found == {"density": 1.0, "rescale": True, "seed": 0}
    assert type(found["density"]) is float
    assert resolve_options("ties", {"scale": -2.5, "average": False})["scale"] == -2.5


@pytest.mark.parametrize(
    ("name", "given_", "message"),
    [
        ("linear", {"density": 0.5}, "options.density: method=linear has no such option: it has none"),
        (
            "ties",
            {"densty": 0.5},
            "options.densty: method=ties has no such option: did you mean 'density'? known: average, density, scale",
        ),
        ("ties", {"density": "0.5"}, "options.density='0.5' must be a number"),
        ("ties", {"density": True}, "options.density=True must be a number"),
        ("ties", {"density": float("nan")}, "options.density=nan must be a number"),
        ("ties", {"scale": float("inf")}, "options.scale=inf must be a number"),
        ("ties", {"average": 1}, "options.average=1 must be true or false"),
        ("dare", {"seed": 1.0}, "options.seed=1.0 must be a whole number"),
        ("dare", {"seed": True}, "options.seed=True must be a whole number"),
        ("dare", {"density": 1.5}, "options.density=1.5 must be between 0 and 1"),
        ("ema", {"decay": -1}, "options.decay=-1.0 must be between 0 and 1"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, given_: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_options(name, given_)
    assert str(error.value) == message


def test_combine_leaves_out_what_has_no_share() -> None:
    def a() -> Tensor:
        return torch.tensor([math.inf, math.nan, -0.0])

    b = torch.tensor([1.0, 2.0, -0.0])
    assert combine_([a(), b], [0, 1]) is b
    assert combine_([a(), b.clone()], [0, 2]).tolist() == [2, 4, 0]
    assert same_bits(combine_([a(), b.clone()], [0, 0.5]), torch.tensor([0.5, 1.0, -0.0]))
    assert combine_([a(), b], [0, 0]).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="shorter"):
        combine_([a(), b], [1])


def test_inputs_are_left_alone_and_never_aliased() -> None:
    a, b = torch.ones(3), torch.zeros(3)
    mix_tensors("linear", [a, b], [1.0, 0.0]).fill_(7)
    mix_tensors("linear", [a, a], [0.5, 0.5]).fill_(7)
    mix_tensors("task_arithmetic", [a], [1.0], b).fill_(7)
    assert a.tolist() == [1, 1, 1]
    assert b.tolist() == [0, 0, 0]
    across = mix_tensors("linear", [torch.arange(8.0).view(4, 2).T, torch.zeros(2, 4)], [0.5, 0.5])
    assert across.tolist() == [[0, 1, 2, 3], [0.5, 1.5, 2.5, 3.5]]


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("dare")])  # what is drawn hangs on it
def test_stretches_cover_a_tensor_longer_than_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(5, 20, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    base = tensors[2] if METHODS[name].base else None
    whole = mix_tensors(name, tensors[:2], [0.4, 0.6], base, torch.float64)
    monkeypatch.setattr("sphinx_pl.mixing.methods.CHUNK", 7)
    assert torch.equal(mix_tensors(name, tensors[:2], [0.4, 0.6], base, torch.float64), whole)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_scalars_and_empty_tensors_keep_their_shape(name: str, shape: tuple[int, ...]) -> None:
    tensors = [torch.full(shape, value, dtype=torch.bfloat16) for value in (1.0, 1.0, 1.0)]
    mixed = mix_tensors(name, tensors[:2], [0.5, 0.5], tensors[2] if METHODS[name].base else None)
    assert same_bits(mixed, tensors[0])


@few
@given(dtype=dtypes, pair=st.tuples(seeds, seeds))
def test_the_ends_give_back_the_inputs(dtype: torch.dtype, pair: tuple[int, int]) -> None:
    a, b = (finite_bits(dtype, seed) for seed in pair)
    for name in ("linear", "slerp"):
        assert same_bits(mix_tensors(name, [a, b], [1.0, 0.0]), a)
        assert same_bits(mix_tensors(name, [a, b], [0.0, 1.0]), b)


@few
@given(dtype=dtypes, seed=seeds, beta=betas)
def test_a_model_mixed_with_itself_is_itself(dtype: torch.dtype, seed: int, beta: float) -> None:
    a, arithmetic = finite_bits(dtype, seed), PRECISE[dtype]
    for name in ("linear", "slerp"):
        assert same_bits(mix_tensors(name, [a, a.clone()], [beta, 1 - beta], arithmetic=arithmetic), a)
    third = mix_tensors("linear", [a, a, a], [beta / 2, beta / 2, 1 - beta], arithmetic=arithmetic)
    assert same_bits(third, a)


@few
@given(dtype=dtypes, pair=st.tuples(seeds, seeds), beta=betas, precise=st.booleans())
def test_the_order_of_two_does_not_matter(
    dtype: torch.dtype, pair: tuple[int, int], beta: float, precise: bool
) -> None:
    a, b = (finite_bits(dtype, seed) for seed in pair)
    arithmetic = PRECISE[dtype] if precise else torch.float32
    for name in ("linear", "slerp"):
        one = mix_tensors(name, [a, b], [beta, 1 - beta], arithmetic=arithmetic)
        assert same_bits(one, mix_tensors(name, [b, a], [1 - beta, beta], arithmetic=arithmetic)), name


@few
@given(dtype=dtypes, three=st.tuples(seeds, seeds, seeds), weights=st.tuples(scales, scales))
def test_the_order_of_two_does_not_matter_with_a_base(
    dtype: torch.dtype, three: tuple[int, int, int], weights: tuple[float, float]
) -> None:
    a, b, base = (finite_bits(dtype, seed) for seed in three)
    near = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in three]
    for first, second, start in ((a, b, base), near):
        for name in ("task_arithmetic", "ties", "model_stock"):
            given_ = (0.5, 0.5) if name == "model_stock" else weights
            one = mix_tensors(name, [first, second], given_, start)
            assert same_bits(one, mix_tensors(name, [second, first], given_[::-1], start)), name


@few
@given(dtype=st.sampled_from(HALF), pair=st.tuples(seeds, seeds), beta=betas)
def test_a_mixture_of_two_lies_between_them(dtype: torch.dtype, pair: tuple[int, int], beta: float) -> None:
    a, b = (finite_bits(dtype, seed) for seed in pair)
    mixed = mix_tensors("linear", [a, b], [beta, 1 - beta])
    assert bool(((torch.minimum(a, b) <= mixed) & (mixed <= torch.maximum(a, b))).all())


@few
@given(dtype=dtypes, three=st.tuples(seeds, seeds, seeds))
def test_task_arithmetic_reaches_the_models_and_the_base(dtype: torch.dtype, three: tuple[int, int, int]) -> None:
    a, b, base = (finite_bits(dtype, seed) for seed in three)
    assert same_bits(mix_tensors("task_arithmetic", [a], [1.0], base), a)
    assert same_bits(mix_tensors("task_arithmetic", [a, b], [0.0, 1.0], base), b)
    assert same_bits(mix_tensors("task_arithmetic", [a, b], [0.0, 0.0], base), base)


COUNT = 1_000_000
EXPONENTS = {torch.bfloat16: (-110, 110), torch.float16: (-22, 10)}


class Case(NamedTuple):
    """A mixture that is linear in its inputs."""

    method: str
    weights: Sequence[float]
    options: Mapping[str, Any] = {}


CASES = {
    "linear of two": Case("linear", [0.3141, 0.6859]),
    "linear of two, decimal": Case("linear", [0.3, 0.7]),
    "linear of three": Case("linear", [0.2718, 0.1414, 0.5868]),
    "linear, extrapolating": Case("linear", [1.5708, -0.5708]),
    "uniform_soup of four": Case("uniform_soup", [0.25] * 4),
    "uniform_soup of three": Case("uniform_soup", [1 / 3] * 3),
    "ema of three": Case("ema", METHODS["ema"].weights(3, {"decay": 0.6366}), {"decay": 0.6366}),  # type: ignore[misc]
    "task_arithmetic of one": Case("task_arithmetic", [0.6181]),
    "task_arithmetic of two": Case("task_arithmetic", [0.6181, 0.8474]),
    "slerp": Case("slerp", [0.3, 0.7]),
    "model_stock of two": Case("model_stock", [0.5, 0.5]),
    "dare of two": Case("dare", [0.6181, 0.8474], {"density": 0.7}),
}


@cache
def values(dtype: torch.dtype, seed: int, wild: bool) -> Tensor:
    """Normal numbers or, if `wild`, such of all exponents."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(COUNT, generator=generator)
    if wild:
        numbers = torch.ldexp(numbers, torch.randint(*EXPONENTS[dtype], (COUNT,), generator=generator))
    return numbers.to(dtype)


def places(numbers: Tensor) -> Tensor:
    """Numbers of 16 bits by their rank: neighbours differ by 1."""
    bits = numbers.view(BITS[numbers.dtype]).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


class Differences(NamedTuple):
    """How many elements of a mixture differ from what float64 gives, rounded once: `wrong` by more than may be."""

    any: int
    wrong: int
    further: int
    infinite: int


@cache
def differences(dtype: torch.dtype, wild: bool, name: str, arithmetic: torch.dtype = torch.float64) -> Differences:
    case = CASES[name]
    method, count = METHODS[case.method], len(case.weights)
    tensors = [values(dtype, seed, wild) for seed in range(count)]
    base = values(dtype, 9, wild) if method.base else None
    mixed = mix_tensors(case.method, tensors, case.weights, base, arithmetic, **case.options)
    doubles = [tensor.double() for tensor in tensors]
    start = base.double() if base is not None else None
    exact: Any
    if start is None and case.method != "slerp":
        exact = sum(w * t for w, t in zip(case.weights, doubles, strict=True))
    elif case.method == "task_arithmetic":
        exact = start + sum(w * (t - start) for w, t in zip(case.weights, doubles, strict=True))
    else:
        exact = mix_tensors(case.method, doubles, case.weights, start, torch.float64, **case.options)
    if case.method == "dare":
        assert start is not None
        terms = [
            start,
            *((t - start) * w / case.options["density"] for w, t in zip(case.weights, doubles, strict=True)),
        ]
    else:
        terms = doubles if start is None else [*doubles, start]
    largest = torch.stack([term.abs() for term in terms]).amax(0)
    rounded, cancelled = rounded_once(exact, dtype), largest * 2**-22
    apart = (places(mixed) - places(rounded)).abs()
    error = (mixed.double() - exact).abs()
    return Differences(
        any=int((apart > 0).sum()),
        wrong=int(((apart > 1) & (error > cancelled)).sum()),
        further=int((error > (rounded.double() - exact).abs() + 2 * cancelled).sum()),
        infinite=int((~mixed.isfinite()).sum()),
    )


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    yield
    values.cache_clear()


INPUTS = {
    "bf16": (torch.bfloat16, False),
    "bf16, wild": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_float64_gives_rounded_once_or_its_neighbour_where_both_are_as_near(name: str, inputs: str) -> None:
    """Fewer than one in 10000 differ: they lie between two numbers but for the last digits of float64."""
    found = differences(*INPUTS[inputs], name)
    assert found.infinite == 0
    assert found.wrong == 0
    assert found.further == 0
    assert found.any < COUNT // 10_000


@pytest.mark.parametrize("name", ["linear of two", "linear of two, decimal", "task_arithmetic of two"])
def test_float32_differs_by_one_place_in_fewer_than_one_in_100(name: str) -> None:
    found = differences(torch.bfloat16, False, name, torch.float32)
    assert found.wrong == found.further == 0
    assert found.any < COUNT // 100
    assert found.any > 0 or "decimal" not in name


def test_pytorch_rounds_float64_to_16_bits_twice_and_this_does_not() -> None:
    """A little more than halfway between 1 and the next bf16 number, by less than float32 can say."""
    values = torch.tensor([1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, 1 + 2**-8, -1 - 2**-8 - 2**-40], dtype=torch.float64)
    assert values.bfloat16().tolist() == [1, 1, 1, -1]
    expected = [1 + 2**-7, 1, 1, -1 - 2**-7]
    assert round_once(values, torch.empty(4, dtype=torch.bfloat16)).tolist() == expected


@few
@given(dtype=st.sampled_from(HALF), seed=seeds)
def test_rounding_once_is_to_the_nearest(dtype: torch.dtype, seed: int) -> None:
    """Of values of all exponents, and of values beside the middle of two 16-bit numbers."""
    near = finite_bits(dtype, seed).double()
    middles = near + (finite_bits(dtype, seed).double() - near.roll(1)) / 2
    for values in (near * 1.1, middles, middles * (1 + 2**-50), middles * (1 - 2**-50)):
        found = round_once(values, torch.empty(len(values), dtype=dtype))
        assert same_bits(found, rounded_once(values, dtype))
