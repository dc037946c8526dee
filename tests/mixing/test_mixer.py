from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from sphinx_pl.checkpoints.format import ModelFolder, open_checkpoint
from sphinx_pl.checkpoints.tensors import content_hash, hash_of_hashes, same_bits
from sphinx_pl.mixing.kernel import _mix
from sphinx_pl.mixing.methods import METHODS, mix_tensors
from sphinx_pl.mixing.mixer import FEW, Facts, Mixer
from sphinx_pl.mixing.plan import open_models
from sphinx_pl.utils.errors import UserError
from tests.checkpoints.conftest import random_tensors
from tests.mixing.conftest import Held, finite_bits, original_folder

Write = Callable[..., Path]
ENCODER = "mixer.towers.clip.model.conv1.weight"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """Stretches of a few elements, so that small tensors have many."""
    for module in ("methods", "mixer"):
        monkeypatch.setattr(f"sphinx_pl.mixing.{module}.CHUNK", 64)
    return 64


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mixer_of(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    method: str = "linear",
    base: Tensor | None = None,
    key: str = "x",
    arithmetic: torch.dtype = torch.float64,
    watch: bool = True,
) -> Mixer:
    """Of models that are one tensor each, in the files "0", "1" and so on."""
    models = [Held({key: tensor}, str(place)) for place, tensor in enumerate(tensors)]
    start = None if base is None else Held({key: base}, "base")
    return Mixer(models, {key: weights}, method, None, start, arithmetic, watch)


def mixed(mixer: Mixer, key: str = "x", dtype: torch.dtype | None = None) -> Tensor:
    pieces = [piece.clone() for piece in mixer.stretches(key, dtype or mixer.info(key).dtype)]
    return torch.cat(pieces) if pieces else torch.empty(0)


def folders(write: Write, count: int, base: bool = False) -> tuple[list[ModelFolder], ModelFolder | None]:
    paths = [write(str(seed), seed) for seed in range(count + base)]
    return open_models(paths[:count], paths[-1] if base else None)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("count", "base"), [(2, False), (5, False), (6, False), (2, True), (5, True)])
def test_facts_are_what_plain_computation_finds(write: Write, count: int, base: bool) -> None:
    models, start = folders(write, count, base)
    everyone = [*models, *([start] if start else [])]
    method = "task_arithmetic" if base else "linear"
    mixer = Mixer(models, {key: [1 / count] * count for key in models[0]}, method, None, start)
    known = {}
    for key in models[0]:
        mixed(mixer, key)
        known[key] = facts = Facts.from_json(json.loads(json.dumps(mixer.facts(key))))
        values = [open_checkpoint(model.path).tensor(key) for model in everyone]
        raw = [value.reshape(-1).view(torch.uint8).numpy() for value in values]
        assert facts.hashes == [xxhash.xxh3_128_hexdigest(piece.tobytes()) for piece in raw]
        assert facts.equal == all(same_bits(values[0], value) for value in values)
        if values[0].dtype.is_floating_point:
            doubles = [value.double().reshape(-1) for value in values]
            assert facts.squares == pytest.approx([float(value @ value) for value in doubles], rel=1e-5)
            for (i, j), square in facts.distances.items():
                apart = doubles[i] - doubles[j]
                assert square == pytest.approx(float(apart @ apart), rel=1e-5)
    pairs = {tuple(sorted(pair)) for pair in known["decoder.a"].distances}
    reference = len(everyone) - 1 if base else 0
    every = {(i, j) for j in range(len(everyone)) for i in range(j)}
    assert pairs == (every if len(everyone) <= FEW else {pair for pair in every if reference in pair})
    for place, model in enumerate(everyone):
        hashes = {key: facts.hashes[place] for key, facts in known.items()}
        assert hash_of_hashes(model, hashes) == content_hash(model, chunk=100)


@pytest.mark.usefixtures("short")
def test_facts_of_equal_and_partly_equal_tensors() -> None:
    a, b = normal(0, 200), normal(0, 200)
    b[150:] += 1
    for second, equal, square in ((a.clone(), True, 0), (b, False, 50)):
        mixer = mixer_of([a, second], [0.5, 0.5])
        mixed(mixer)
        facts = mixer.facts("x")
        assert facts["equal"] == equal
        assert facts["distances"] == [[0, 1, pytest.approx(square, rel=1e-5)]]
        assert facts["squares"] == pytest.approx([float(a @ a), float(second @ second)], rel=1e-5)
    zeros = mixer_of([torch.zeros(3), -torch.zeros(3)], [0.5, 0.5])
    mixed(zeros)
    assert not zeros.facts("x")["equal"]


def test_facts_of_huge_numbers_are_finite() -> None:
    mixer = mixer_of([torch.full((9,), 2e30), torch.full((9,), 1e30)], [0.5, 0.5])
    assert mixed(mixer).tolist() == pytest.approx([1.5e30] * 9)
    assert mixer.facts("x")["squares"] == pytest.approx([3.6e61, 9e60], rel=1e-6)
    assert mixer.facts("x")["distances"] == [[0, 1, pytest.approx(9e60, rel=1e-6)]]


def test_what_is_not_watched_is_mixed_the_same_and_has_no_facts() -> None:
    a, b = normal(0, 100), normal(1, 100)
    mixer = mixer_of([a, b], [0.25, 0.75], watch=False)
    assert same_bits(mixed(mixer), mixed(mixer_of([a, b], [0.25, 0.75])))
    with pytest.raises(KeyError):
        mixer.facts("x")
    b[50] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        mixed(mixer_of([a, b], [0.25, 0.75], watch=False))


@pytest.mark.usefixtures("short")
def test_a_model_that_diverged_is_named(subtests: pytest.Subtests) -> None:
    for method in METHODS:
        for broken in (float("nan"), float("-inf")):
            for place in (0, 1, 2):
                with subtests.test(method=method, broken=broken, place=place):
                    tensors = [normal(seed, 200, dtype=torch.bfloat16) for seed in range(3)]
                    tensors[place][199] = broken
                    base = tensors[2] if METHODS[method].base else None
                    mixer = mixer_of(tensors[:2], [0.5, 0.5], method, base)
                    if place == 2 and base is None:
                        assert mixed(mixer).isfinite().all()
                        continue
                    with pytest.raises(UserError) as error:
                        mixed(mixer)
                    name = "base" if place == 2 else str(place)
                    assert str(error.value).startswith(f"'x' in '{name}' holds NaN or infinite values")
                    assert "\n" not in str(error.value)


def test_what_diverged_is_found_without_weight_and_where_all_are_equal() -> None:
    a, b = torch.zeros(10), torch.full((10,), float("nan"))
    with pytest.raises(UserError, match="'x' in '1' holds NaN"):
        mixed(mixer_of([a, b], [1.0, 0.0]))
    with pytest.raises(UserError, match="'x' in '0' holds NaN"):
        mixed(mixer_of([b, b.clone()], [0.5, 0.5]))


@pytest.mark.usefixtures("short")
def test_a_causal_mask_that_all_have_is_copied(subtests: pytest.Subtests) -> None:
    for method in METHODS:
        for dtype in (torch.float32, torch.bfloat16):
            with subtests.test(method=method, dtype=dtype):
                mask = torch.full((14, 14), float("-inf"), dtype=dtype).triu(1).flatten()
                base = mask.clone() if METHODS[method].base else None
                mixer = mixer_of([mask, mask.clone()], [0.5, 0.5], method, base)
                assert same_bits(mixed(mixer), mask)
                facts = mixer.facts("x")
                assert facts["equal"]
                assert set(facts["squares"]) == {0.0}
                mask[3] = float("nan")
                with pytest.raises(UserError, match="'x' in '0' holds NaN"):
                    mixed(mixer_of([mask, mask.clone()], [0.5, 0.5], method, base))


def test_integers_are_copied_if_they_are_equal(subtests: pytest.Subtests) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        for method in METHODS:
            with subtests.test(dtype=dtype, method=method):
                values, base = torch.arange(70).to(dtype), METHODS[method].base
                mixer = mixer_of([values, values.clone()], [0.5, 0.5], method, values.clone() if base else None)
                assert same_bits(mixed(mixer, dtype=torch.bfloat16), values)
                assert mixer.facts("x")["equal"]
                other = values.clone()
                other[69] = 0
                with pytest.raises(UserError, match="'x' holds integers that differ between the checkpoints"):
                    mixed(mixer_of([values, other], [0.5, 0.5], method, values.clone() if base else None))


@pytest.mark.parametrize(
    ("values", "weights", "method", "dtype"),
    [
        ([60000.0, -60000.0], [1.5, -0.5], "linear", torch.float16),
        ([60000.0, 60000.0], [1.0, 1.0], "linear", torch.float16),
        ([60000.0, 1e5], [0.5, 0.5], "linear", torch.float16),  # of float32
        ([3e38, -3e38], [1.5, -0.5], "linear", torch.float32),
        ([60000.0, 60000.0], [1.0, 1.0], "task_arithmetic", torch.float16),
    ],
)
def test_a_mixture_that_its_dtype_cannot_hold_is_refused(
    values: list[float], weights: list[float], method: str, dtype: torch.dtype
) -> None:
    stored = torch.float32 if max(values) > 65504 else dtype
    tensors = [torch.tensor([1.0, value], dtype=stored) for value in values]
    base = torch.tensor([1.0, -60000.0], dtype=stored) if METHODS[method].base else None
    with pytest.raises(UserError, match=f"the mixture of 'x' overflows {dtype}: use smaller weights"):
        mixed(mixer_of(tensors, weights, method, base), dtype=dtype)


def test_slerp_can_leave_the_inputs_range_and_is_refused_then() -> None:
    a, b = (torch.tensor([60000.0, sign * 60000.0]).half() for sign in (1, -1))  # 90° apart: √½ of each
    with pytest.raises(UserError, match=r"overflows torch\.float16"):
        mixed(mixer_of([a, b], [0.5, 0.5], "slerp"))
    assert mixed(mixer_of([a, b], [0.5, 0.5], "slerp"), dtype=torch.float32)[0] == pytest.approx(84852.8)


def test_the_largest_numbers_are_no_overflow() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        a = torch.full((10,), torch.finfo(dtype).max, dtype=dtype)
        assert same_bits(mixed(mixer_of([a, -a], [1.0, 0.0])), a)
        b = a.clone()
        b[0] = 0
        assert same_bits(mixed(mixer_of([a, b], [0.3, 0.7]))[1:], a[1:])


@pytest.mark.usefixtures("short")
def test_stretches_make_up_the_whole(subtests: pytest.Subtests) -> None:
    for method in METHODS:
        for numel in (0, 1, 63, 64, 65, 128, 1000):
            with subtests.test(method=method, numel=numel):
                tensors = [normal(seed, numel, dtype=torch.bfloat16) for seed in range(3)]
                base, weights = tensors[2] if METHODS[method].base else None, [0.4, 0.6]
                mixer = mixer_of(tensors[:2], weights, method, base, key="")  # what dare draws hangs on the name
                pieces = [len(piece) for piece in mixer.stretches("", torch.bfloat16)]
                assert pieces == [min(64, numel - start) for start in range(0, numel, 64)]
                assert same_bits(mixer.tensor(""), mix_tensors(method, tensors[:2], weights, base))


@pytest.mark.usefixtures("short")
def test_the_kernel_is_compiled_for_one_order_in_memory(short: int) -> None:
    """Also of a tensor whose last stretch is shorter: a second kernel would take seconds when first used."""
    mixed(mixer_of([normal(0, 3 * short + 5), normal(1, 3 * short + 5)], [0.4, 0.6]))
    layouts = {array.layout for signature in _mix.signatures for array in signature if hasattr(array, "layout")}
    assert layouts == {"C"}


def test_shapes_are_kept_and_the_weights_are_each_tensors_own() -> None:
    shapes: dict[str, tuple[int, ...]] = {"matrix": (30, 7), "scalar": (), "empty": (0, 5), "one": (1, 1)}
    a, b = ({name: normal(seed, *shape) for name, shape in shapes.items()} for seed in (0, 1))
    weights = {"matrix": [0.25, 0.75], "scalar": [1.0, 0.0], "empty": [0.5, 0.5], "one": [1.5, -0.5]}
    mixer = Mixer([Held(a), Held(b)], weights)
    for name in shapes:
        assert same_bits(mixer.tensor(name), mix_tensors("linear", [a[name], b[name]], weights[name])), name


def test_tensors_of_different_dtypes_are_mixed_in_the_wider_one() -> None:
    a, b = normal(0, 300), normal(1, 300, dtype=torch.bfloat16)
    expected = (0.25 * a.double() + 0.75 * b.double()).float()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = mixed(mixer_of([a, b], [0.25, 0.75]), dtype=dtype)
        assert found.dtype == dtype
        assert torch.allclose(found.float(), expected.to(dtype).float(), rtol=2 * torch.finfo(dtype).eps)
    exact = 0.25 * a.double() + 0.75 * normal(1, 300).double()
    wide = mixed(mixer_of([a, normal(1, 300).double()], [0.25, 0.75]), dtype=torch.float64)
    assert torch.equal(wide, exact)
    more = mixed(mixer_of([a, normal(1, 300)], [0.25, 0.75], arithmetic=torch.float64), dtype=torch.float64)
    assert torch.equal(more, exact)
    half = mixer_of([a.half(), a.half().float()], [0.25, 0.75])
    assert same_bits(mixed(half), a.half())
    assert not half.facts("x")["equal"]


@pytest.mark.usefixtures("short")
def test_equal_tensors_are_copied_bit_for_bit(subtests: pytest.Subtests) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for method in METHODS:
            with subtests.test(dtype=dtype, method=method):
                a = finite_bits(dtype, 0, 200)
                base = a.clone() if METHODS[method].base else None
                assert same_bits(mixed(mixer_of([a, a.clone()], [0.3, 0.7], method, base)), a)


@pytest.mark.usefixtures("short")
def test_encoders_that_nobody_trained_stay_what_they_are_under_any_weights() -> None:
    a = finite_bits(torch.bfloat16, 1, 200)
    a[a.abs() > 1e30] = 1
    assert same_bits(mixed(mixer_of([a, a.clone()], [0.7, 0.8], key=ENCODER), ENCODER), a)
    other = mixed(mixer_of([a, a.clone()], [0.7, 0.8], key="decoder.norm.weight"), "decoder.norm.weight")
    assert same_bits(other, mix_tensors("linear", [a, a], [0.7, 0.8]))
    assert not same_bits(other, a)


def test_equal_tensors_are_stored_in_another_dtype() -> None:
    a = normal(0, 100)
    assert same_bits(mixed(mixer_of([a, a.clone()], [0.3, 0.7]), dtype=torch.bfloat16), a.bfloat16())


@pytest.mark.usefixtures("short")
def test_a_stretch_that_is_equal_is_mixed_as_the_rest_of_its_tensor(subtests: pytest.Subtests) -> None:
    for method in ("linear", "slerp", "task_arithmetic", "ties", "model_stock"):
        with subtests.test(method=method):
            a, b, c = normal(0, 640), normal(1, 640), normal(2, 640)
            b[64:128] = c[64:128] = a[64:128]
            base = c if METHODS[method].base else None
            mixture = mixed(mixer_of([a, b], [0.5, 0.5], method, base))
            assert torch.allclose(mixture, mix_tensors(method, [a, b], [0.5, 0.5], base), rtol=1e-6, atol=1e-6)
            if method == "slerp":  # about 84° apart, and longer than on the chord
                assert float((mixture[64:128] / a[64:128]).mean()) > 1.3


WHOLE = {
    "tok_embeddings.weight": (48, 16),
    "layers.0.attention.wq.weight": (16, 16),
    "layers.0.attention.wo.weight": (16, 16),
    "layers.0.feed_forward.w2.weight": (16, 40),
    "norm.weight": (16,),
    "visual_proj.0.weight": (16, 24),
}


def originals(tmp_path: Path, shards: int, count: int) -> tuple[list[dict[str, Tensor]], list[Path]]:
    """Models whose ranks' parts are at other angles than the wholes."""
    models = []
    for seed in range(count):
        model = {name: normal(seed, *shape) for name, shape in WHOLE.items()}
        for name, shape in WHOLE.items():
            if len(shape) == 2:
                model[name][:8, : shape[1] // 2] += 3 * (-1) ** seed
                model[name][8:, shape[1] // 2 :] += 2
        models.append(model)
    return models, [original_folder(tmp_path / str(i), model, shards) for i, model in enumerate(models)]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("method", ["slerp", "ties", "model_stock"])
def test_what_is_measured_of_a_tensor_that_ranks_share_is_that_of_the_whole(
    tmp_path: Path, shards: int, method: str
) -> None:
    tensors, paths = originals(tmp_path, shards, 3)
    models, base = open_models(paths[:2], paths[2] if METHODS[method].base else None)
    assert models[0].kind == f"original/{shards}"
    mixer = Mixer(models, {key: [0.4, 0.6] for key in models[0]}, method, None, base)
    ranks: list[dict[str, Tensor]] = [
        {name: mixer.tensor(f"{rank}/llma.{name}") for name in WHOLE} for rank in range(shards)
    ]
    out = original_folder(tmp_path / "out", dict(tensors[0]), shards)
    for rank, part in enumerate(ranks):
        state = {"model": {f"llma.{name}": tensor for name, tensor in part.items()}}
        torch.save(state, out / f"consolidated.{rank:02d}-of-{shards:02d}.model.pth")
    (found,), _ = open_models([out], own=False)
    for name in WHOLE:
        start = tensors[2][name] if base else None
        expected = mix_tensors(method, [model[name] for model in tensors[:2]], [0.4, 0.6], start)
        key = next(key for key in found if key == models[0].canonical_name(f"0/llma.{name}"))
        tensor = mixed(Mixer([found, found], {key: [1.0, 0.0]}), key).view(expected.shape)
        assert torch.allclose(tensor, expected, rtol=1e-6, atol=1e-6), name


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_have_a_tensor_each_get_the_same_mixture_of_it(tmp_path: Path, method: str) -> None:
    _, paths = originals(tmp_path, 2, 3)
    models, base = open_models(paths[:2], paths[2] if METHODS[method].base else None)
    mixer = Mixer(models, {key: [0.4, 0.6] for key in models[0]}, method, None, base)
    for name in ("norm.weight", "visual_proj.0.weight"):
        assert same_bits(mixer.tensor(f"0/llma.{name}"), mixer.tensor(f"1/llma.{name}")), name


@pytest.mark.usefixtures("short")
def test_several_threads_get_what_one_gets(subtests: pytest.Subtests) -> None:
    for method in METHODS:
        with subtests.test(method=method):
            names = [f"{rank}/{name}" for name in "abc" for rank in range(2)]
            parts = {key: [f"{rank}/{key[-1]}" for rank in range(2)] for key in names}
            models = [
                Held({key: normal(7 * seed + i, 300) for i, key in enumerate(names)}, parts=parts) for seed in range(3)
            ]
            base, weights = models[2] if METHODS[method].base else None, {key: [0.4, 0.6] for key in names}
            alone = Mixer(models[:2], weights, method, None, base)
            expected = [alone.tensor(key) for key in names]
            together = Mixer(models[:2], weights, method, None, base)
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(together.tensor, names))
            assert all(same_bits(x, y) for x, y in zip(found, expected, strict=True))
            assert all(alone.facts(key) == together.facts(key) for key in names)


def test_checkpoints_of_the_project_are_mixed_as_their_tensors_are(write: Write) -> None:
    models, _ = folders(write, 2)
    mixer = Mixer(models, {key: [0.25, 0.75] for key in models[0]})
    tensors = [random_tensors(seed) for seed in (0, 1)]
    for key in models[0]:
        a, b = (model[key] for model in tensors)
        expected = mix_tensors("linear", [a, b], [0.25, 0.75]) if a.dtype.is_floating_point else a
        assert same_bits(mixer.tensor(key), expected), key
