"""Whole checkpoints: what goes together, and what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mix_weights import MixConfig
from sphinx_pl.checkpoint.format import open_checkpoint, same_bits
from sphinx_pl.checkpoint.stored import content_hash, open_stored, store
from sphinx_pl.errors import UserError
from sphinx_pl.mixing.mix import check_weights, mix_checkpoints
from tests.checkpoint.conftest import PROCESSOR, random_tensors, small_config

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("weights", "normalize", "message"),
    [
        ([0.5], False, "1 numbers for 2 checkpoints"),
        ([0.5, 0.6], False, "sum to 1.1, not 1"),
        ([0.5, 0.5 + 2e-6], False, "normalize=true"),
        ([math.nan, 0.5], False, "finite"),
        ([math.inf, -math.inf], False, "finite"),
        ([math.inf, 1.0], True, "finite"),
        ([1.0, -1.0], True, "sum to 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: list[float], normalize: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_weights(weights, 2, normalize)


def test_weights_are_normalized() -> None:
    assert check_weights([1, 3], 2, normalize=True) == [0.25, 0.75]
    assert sum(check_weights([0.3333333, 0.6666666], 2, normalize=True)) == pytest.approx(1, abs=1e-15)
    assert check_weights([0.3, 0.7], 2) == [0.3, 0.7]
    assert check_weights([0.3, 0.9], 2, any_sum=True) == [0.3, 0.9]
    assert check_weights([1, 3], 2, normalize=True, any_sum=True) == [0.25, 0.75]


def test_mixing_whole_checkpoints(write: Write, tmp_path: Path) -> None:
    paths = [write("a", 0), write("b", 1)]
    said = mix_checkpoints(paths, [1, 3], tmp_path / "out", normalize=True)
    a, b, out = (open_checkpoint(path) for path in (*paths, tmp_path / "out"))
    for name in ("decoder.a", "decoder.b", "decoder.c", "decoder.scalar"):
        exact = 0.25 * a.tensor(name).double() + 0.75 * b.tensor(name).double()
        dtype = a.info(name).dtype
        assert out.info(name) == a.info(name)
        if dtype == torch.float32:  # that of the arithmetic, which rounds too
            assert torch.allclose(out.tensor(name).double(), exact, rtol=2**-22, atol=2**-24), name
        else:
            assert same_bits(out.tensor(name), exact.to(dtype)), name
    assert out.tensor("mixer.towers.clip.steps").tolist() == [0, 1, 2, 3]
    assert out.config == a.config
    assert out.tokenizer_file.read_bytes() == b"pieces"
    assert out.provenance["mixing"] == said
    assert (said["method"], said["weights"]) == ("linear", [0.25, 0.75])
    parents = [(parent["path"], parent["stage"], parent["xxh3_128"]) for parent in out.provenance["parents"]]
    hashes = [content_hash(stored) for stored in store([open_stored(path) for path in paths])]
    assert parents == [(str(paths[i]), "ab"[i], hashes[i]) for i in range(2)]


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
        ({"tokenizer": b"other pieces"}, ["tokenizers differ"]),
        ({"tensors": _without("decoder.b")}, ["missing: 'decoder.b'"]),
        ({"tensors": _with("decoder.extra", torch.zeros(1))}, ["unexpected: 'decoder.extra'"]),
        ({"tensors": _with("decoder.a", torch.zeros(7, 5))}, ["'decoder.a' is [7, 5] instead of [5, 7]"]),
        ({"tensors": _with("decoder.a", torch.zeros(5, 7).half())}, ["'decoder.a'", "float32", "float16"]),
        ({"tensors": _with("decoder.a", NAN)}, ["'decoder.a'", "NaN"]),
        ({"tensors": _with("decoder.a", torch.full((5, 7), float("inf")))}, ["'decoder.a'", "infinite"]),
        ({"tensors": _with("mixer.towers.clip.steps", torch.zeros(4).long())}, ["steps", "integers"]),
    ],
)
def test_checkpoints_that_do_not_go_together_are_refused(
    write: Write, tmp_path: Path, other: dict[str, Any], names: list[str]
) -> None:
    a, b = write("a", 0), write("b", **({"tensors": 1} | other))
    with pytest.raises(UserError) as error:
        mix_checkpoints([a, b], [0.5, 0.5], tmp_path / "out")
    message = str(error.value)
    assert "\n" not in message
    assert str(b) in message or "integers" in message
    assert all(name in message for name in names), message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()


def test_names_and_weight_sources_may_differ(write: Write, tmp_path: Path) -> None:
    renamed = small_config().to_dict() | {"name": "other"}
    mix_checkpoints([write("a", 0), write("b", 1, model=renamed)], [0.5, 0.5], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["name"] == "small"


def test_an_overflow_is_refused(write: Write, tmp_path: Path) -> None:
    paths = [write(name, {"t": torch.tensor([sign * 60000.0]).half()}) for name, sign in (("a", 1), ("b", -1))]
    with pytest.raises(UserError, match=r"'t' overflows torch.float16"):
        mix_checkpoints(paths, [1.5, -0.5], tmp_path / "out")


def test_a_greedy_soup_is_a_linear_mixture_whose_weights_are_still_to_be_found() -> None:
    recipe = MixConfig(checkpoints=["a", "b"], method="greedy_soup", out="out").recipe(2)
    assert (recipe.method, recipe.weights) == ("linear", [0.5, 0.5])


def test_other_refusals(write: Write, tmp_path: Path) -> None:
    a = write("a", 0)
    with pytest.raises(UserError, match="exists"):
        mix_checkpoints([a, a], [0.5, 0.5], a)
    with pytest.raises(UserError, match="at least two"):
        mix_checkpoints([a], [1.0], tmp_path / "out")
    with pytest.raises(UserError, match="did you mean 'linear'"):
        mix_checkpoints([a, a], [0.5, 0.5], tmp_path / "out", method="linaer")
    with pytest.raises(UserError, match="starts from a base model: give base=FOLDER"):
        mix_checkpoints([a, a], [0.5, 0.5], tmp_path / "out", method="ties")
    with pytest.raises(UserError, match="method=linear has no base"):
        mix_checkpoints([a, a], [0.5, 0.5], tmp_path / "out", base=a)
    with pytest.raises(UserError, match="method=slerp is for 2 checkpoints, not 3"):
        mix_checkpoints([a, a, a], [0.5, 0.5, 0], tmp_path / "out", method="slerp")
    with pytest.raises(UserError, match="chooses the weights itself"):
        mix_checkpoints([a, a], [0.5, 0.5], tmp_path / "out", method="uniform_soup")
    with pytest.raises(UserError, match="how much of each"):
        mix_checkpoints([a, a], None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["a"]
