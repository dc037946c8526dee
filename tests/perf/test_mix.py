from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from perf import mix
from perf.harness import run_process
from perf.mix import Folder, Llama, deviations, inside, rounded_once, tinyllama
from sphinx_pl.utils.errors import UserError
from tests.mixing.conftest import rounded_once as nearest

SMALL = Llama(64, 2, 2, 1, 96)


@pytest.mark.parametrize("shape", ["tinyllama", "13b"])
def test_time_memory_and_exactness_are_printed(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mix, "tinyllama", lambda parameters: SMALL)
    monkeypatch.setattr(mix, "LLAMA_13B", SMALL)
    monkeypatch.setattr(mix, "SHARD_BYTES", 5_000_000)
    assert mix.main([str(tmp_path / "made"), "--rounds=1", f"--shape={shape}"]) == 0
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line[:1] == "│"]
    assert [row[0] for row in cells] == (["cp", "ours", "loop"] if shape == "tinyllama" else ["ours"])
    [ours] = [row for row in cells if row[0] == "ours"]
    assert ours[-1] == "0", "every element is that of float64 arithmetic"
    assert f"{SMALL.count:,}" in printed
    assert not (tmp_path / "made").exists()


def test_mergekit_is_one_of_them(tmp_path: Path) -> None:
    assert "mergekit" not in mix.commands(tmp_path, None)
    out, command = mix.commands(tmp_path, Path("bin/mergekit-yaml"))["mergekit"]
    assert command == ["bin/mergekit-yaml", str(tmp_path / "mergekit.yaml"), str(out)]
    recipe = json.loads((tmp_path / "mergekit.yaml").read_text())
    assert (recipe["merge_method"], recipe["dtype"]) == ("linear", "bfloat16")
    assert [entry["parameters"]["weight"] for entry in recipe["models"]] == [0.4, 0.6]


def test_a_process_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = run_process(["sh", "-c", f"mkdir {out}; echo 1 > {out}/file; echo 'Mixed: {out} in 2.5 s'"], out)
    assert (inside(process), process.written) == (2.5, 2)
    assert 0 < process.ended <= process.synced
    assert inside(run_process(["mkdir", str(out)], out)) is None
    with pytest.raises(UserError, match="failed: no such checkpoint"):
        run_process(["python3", "-c", "raise SystemExit('no such checkpoint')"], out)


@pytest.mark.parametrize(("parameters", "count"), [(1.1e9, 1_100_048_384), (1e7, 1e7)])
def test_a_model_has_about_the_parameters_that_were_asked_for(parameters: float, count: float) -> None:
    assert tinyllama(parameters).count == pytest.approx(count, rel=0.2 if parameters < 1e9 else 0)
    assert mix.LLAMA_13B.count == 13_015_864_320


def test_sparse_files_take_little_disk(tmp_path: Path) -> None:
    mix.write_model(tmp_path / "a", tinyllama(1e7), "a", values=100)
    mix.write_model(tmp_path / "b", tinyllama(1e7), "b", values=100)
    a, b = Folder(tmp_path / "a"), Folder(tmp_path / "b")
    assert all(not torch.equal(a.tensor(name), b.tensor(name)) for name in a.files)
    [file] = (tmp_path / "a").glob("*.safetensors")
    assert file.stat().st_size > 2 * tinyllama(1e7).count > 10 * 512 * file.stat().st_blocks


def test_float64_is_rounded_once() -> None:
    number = torch.randn(200, generator=torch.Generator().manual_seed(0)).bfloat16()
    tie = (number.double() + (number.view(torch.int16) + 1).view(torch.bfloat16).double()) / 2
    values = torch.cat([tie, *(tie * (1 + sign * 2.0**-bits) for bits in (20, 30, 52) for sign in (-1, 1))])
    assert torch.equal(rounded_once(values), nearest(values, torch.bfloat16))
    assert not torch.equal(rounded_once(values), values.bfloat16()), "PyTorch rounds by way of float32"


def written(folder: Path, **tensors: Tensor) -> Folder:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return Folder(folder)


def test_deviations_are_counted(tmp_path: Path) -> None:
    x, y = torch.randn(2, 70_000).bfloat16()
    exact = rounded_once(0.4 * x.double() + 0.6 * y.double())
    off = exact.clone()
    off.view(torch.int16)[:7] += 1
    off[-1] = 100.0
    inputs = [written(tmp_path / name, w=value) for name, value in (("x", x), ("y", y))]
    outs = {name: written(tmp_path / name, w=value) for name, value in (("good", exact), ("bad", off))}
    assert deviations(outs, inputs, mix.WEIGHTS) == {"good": 0, "bad": 8}


@pytest.mark.parametrize(
    ("out", "message"),
    [({"v": torch.zeros(3)}, "tensors of"), ({"w": torch.zeros(4)}, "'w' is not"), ({"w": torch.zeros(3)}, "bfloat16")],
)
def test_another_model_is_refused(tmp_path: Path, out: dict[str, Tensor], message: str) -> None:
    model = written(tmp_path / "in", w=torch.zeros(3).bfloat16())
    with pytest.raises(UserError, match=message):
        deviations({"out": written(tmp_path / "out", **out)}, [model, model], mix.WEIGHTS)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    assert mix.main([str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())
