from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import mix
from benchmarks.mix import LLAMA_13B, Random, count, deviations, in_words, rounded_once, tinyllama, ulps, write_random
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY

TOKENIZER = REPOSITORY / "tests/golden/tokenizer.model"
SMALL = DecoderConfig(vocab_size=512, width=64, layers=2, heads=2, kv_heads=1, ffn_width=96)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "tinyllama", lambda parameters: SMALL)
    monkeypatch.setattr(mix, "LLAMA_13B", SMALL)


@pytest.mark.usefixtures("small")
def test_time_memory_and_exactness_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    assert mix.main([str(folder), "--rounds=1", f"--tokenizer={TOKENIZER}"]) == 0
    printed = capsys.readouterr().out
    rows = {line.strip("│ ").split(" ")[0]: line for line in printed.splitlines() if line.startswith("│")}
    assert rows.keys() == {"cp", "ours", "loop"}
    for column in ("on the disk after s", "without imports s", "time / cp's", "GB/s", "peak MB", "of it anonymous"):
        assert column in printed
    for name in ("ours and float64 rounded once", "loop and float64 rounded once", "ours and loop"):
        assert f"{name}: " in printed
    assert printed.count(f"{count(SMALL):,}") == 3, "every element is compared"
    assert not folder.exists()


@pytest.mark.usefixtures("small")
def test_memory_of_a_large_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    assert mix.main([str(folder), "--shape=13b", f"--tokenizer={TOKENIZER}"]) == 0
    printed = capsys.readouterr().out
    for name in ("real values", "sparse values"):
        assert f"│ {name}" in printed
        assert f"{name}: ours and float64 rounded once" in printed
    assert not folder.exists()


def test_mergekit_is_one_of_them(tmp_path: Path) -> None:
    assert "mergekit" not in mix.commands(tmp_path, None)
    out, command = mix.commands(tmp_path, Path("bin/mergekit-yaml"))["mergekit"]
    assert command == ["bin/mergekit-yaml", str(tmp_path / "mergekit.yaml"), str(out)]
    recipe = json.loads((tmp_path / "mergekit.yaml").read_text())
    assert (recipe["merge_method"], recipe["dtype"]) == ("linear", "bfloat16")
    assert [Path(entry["model"]).name for entry in recipe["models"]] == ["a", "b"]
    assert [entry["parameters"]["weight"] for entry in recipe["models"]] == [0.4, 0.6]


def test_seconds_that_a_command_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = mix.mix(["sh", "-c", f"mkdir {out}; echo 1 > {out}/file; echo 'Mixed: {out} in 2.5 s'"], out)
    assert said.inside == 2.5
    assert said.run.written == 2
    assert mix.mix(["mkdir", str(out)], out).inside is None


# -- the checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [1e7, 1e8, 5e8])
def test_a_model_has_about_the_parameters_that_were_asked_for(parameters: float) -> None:
    assert count(tinyllama(parameters)) == pytest.approx(parameters, rel=0.2)


def test_sizes_are_the_published_ones() -> None:
    assert tinyllama(1.1e9) == DecoderConfig(32_000, 2048, 22, 32, 4, 5632, max_positions=2048)
    assert count(tinyllama(1.1e9)) == 1_100_048_384
    assert count(LLAMA_13B) == 13_015_864_320


def test_parameters_are_counted_as_they_are() -> None:
    assert sum(info.numel for info in Random(SMALL, "").infos.values()) == count(SMALL)


@pytest.mark.parametrize("sparse", [False, True])
def test_two_models_differ_in_every_tensor(tmp_path: Path, sparse: bool) -> None:
    config = DecoderConfig(vocab_size=4096, width=64, layers=1, heads=2, kv_heads=1, ffn_width=96)
    for name in mix.BOTH:
        if sparse:
            mix.write_sparse(tmp_path / name, config, name, TOKENIZER, max_bytes=10**6)
        else:
            write_random(tmp_path / name, config, name, TOKENIZER)
    a, b = (open_checkpoint(tmp_path / name) for name in mix.BOTH)
    assert list(a) == list(b)
    assert set(a) == set(Random(config, "").infos)
    for name in a:
        assert a.tensor(name).dtype == torch.bfloat16
        assert not torch.equal(a.tensor(name), b.tensor(name)), name
    embeddings = a.tensor("decoder.tok_embeddings.weight").flatten()
    assert embeddings.float().std() == pytest.approx(0.02 * (0.5 if sparse else 1), rel=0.02)
    assert bool(embeddings[mix.BEGINNING :].any()) != sparse
    if sparse:
        found = [file.stat() for file in (tmp_path / "a").glob("*.safetensors")]
        assert len(found) > 1
        assert sum(status.st_size for status in found) > 2 * count(config)
        assert sum(status.st_blocks * 512 for status in found) < 2 * count(config), "zeros take no disk"


# -- exactness -------------------------------------------------------------------------------------------------------


def nearest(value: float) -> float:
    """By definition: among the neighbours, the one that is less far or, in a tie, even."""
    start = torch.tensor(value, dtype=torch.float64).bfloat16().view(torch.int16)
    neighbours = torch.stack([start + step for step in (-1, 0, 1)]).view(torch.bfloat16)
    last_bits = neighbours.view(torch.int16) & 1
    found: list[tuple[float, int]] = list(zip(neighbours.tolist(), last_bits.tolist(), strict=True))
    return min(found, key=lambda near: (abs(Fraction(near[0]) - Fraction(value)), near[1]))[0]


def hard_cases() -> Tensor:
    """Ties of two bfloat16 numbers, what is a little beside them, and any numbers."""
    generator = torch.Generator().manual_seed(0)
    number = torch.randn(200, generator=generator).bfloat16()
    above = (number.view(torch.int16) + 1).view(torch.bfloat16)
    tie = (number.double() + above.double()) / 2
    beside = [tie * (1 + sign * 2.0**-bits) for bits in (20, 25, 30, 40, 52) for sign in (-1, 1)]
    return torch.cat([tie, *beside, torch.randn(500, generator=generator, dtype=torch.float64), number.double()])


def test_float64_is_rounded_once() -> None:
    values = hard_cases()
    found = rounded_once(values)
    assert found.tolist() == [nearest(value) for value in values.tolist()]
    twice = values.bfloat16()
    assert not torch.equal(found, twice), "PyTorch's rounding by way of float32 is another"


def test_rounding_at_the_ends() -> None:
    for value in (0.0, -0.0, 1e-40, -3e-39, 1e-300, 1e38, float("inf"), -float("inf")):
        found = rounded_once(torch.tensor([value], dtype=torch.float64))
        assert found.item() == torch.tensor(value, dtype=torch.float64).bfloat16().item()
        assert torch.signbit(found).item() == (str(value)[0] == "-")


def test_ulps_are_steps_between_numbers() -> None:
    numbers = torch.tensor([-1.0, -0.0, 0.0, 1.0, 1.0, 2.0]).bfloat16()
    others = torch.tensor([-1.0078125, 0.0, -0.0, 1.0, 0.99609375, -2.0]).bfloat16()
    assert ulps(numbers, others).tolist() == [1, 0, 0, 0, 1, 2 * 0x4000]


def written(folder: Path, **tensors: Tensor) -> Path:
    return write_checkpoint(
        folder, tensors, SphinxConfig(name="small", decoder=SMALL, vision=None).to_dict(), {}, TOKENIZER, {}
    )


def test_deviations_are_counted(tmp_path: Path) -> None:
    x, y = torch.randn(2, 70_000).bfloat16()
    x[-40_000:] = y[-40_000:] = 0
    exact = rounded_once(0.4 * x.double() + 0.6 * y.double())
    off = exact.clone()
    off.view(torch.int16)[:7] += 1
    off.view(torch.int16)[8] += 5
    off[-1] = 1.0
    inputs = [open_checkpoint(written(tmp_path / str(n), w=value)) for n, value in enumerate((x, y))]
    outs = {name: open_checkpoint(written(tmp_path / name, w=value)) for name, value in (("good", exact), ("bad", off))}
    found = deviations(outs, inputs, mix.WEIGHTS)
    one = int(torch.tensor(1.0).bfloat16().view(torch.int16))
    assert found == {
        "good and float64 rounded once": Counter({0: 70_000}),
        "bad and float64 rounded once": Counter({0: 69_991, 1: 7, 5: 1, one: 1}),
        "good and bad": Counter({0: 69_991, 1: 7, 5: 1, one: 1}),
    }
    assert in_words(found["good and float64 rounded once"]) == "all 70,000 elements are the same"
    said = f"9 of 70,000 elements differ: 7 by 1 ulp, 1 by 2 to 9, 1 by more, at most {one:,}"
    assert in_words(found["good and bad"]) == said


@pytest.mark.parametrize(
    ("out", "message"),
    [({"v": torch.zeros(3)}, "'v'"), ({"w": torch.zeros(4)}, r"'w' is \[4\]"), ({"w": torch.zeros(3)}, "not bfloat16")],
)
def test_another_model_is_refused(tmp_path: Path, out: dict[str, Tensor], message: str) -> None:
    model = open_checkpoint(written(tmp_path / "in", w=torch.zeros(3).bfloat16()))
    with pytest.raises(UserError, match=message):
        deviations({"out": open_checkpoint(written(tmp_path / "out", **out))}, [model, model], mix.WEIGHTS)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        mix.main([str(tmp_path)])
    assert not list(tmp_path.iterdir())
