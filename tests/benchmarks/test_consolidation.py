from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import consolidation
from benchmarks.consolidation import PREFIX, check, decoder_of
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.decoder import Decoder
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY

TOKENIZER = REPOSITORY / "tests/golden/tokenizer.model"


@pytest.mark.long  # two ranks and four converters start one after another
@pytest.mark.timeout(300)
def test_both_converters_are_measured_and_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    folder = tmp_path / "made"
    arguments = [str(folder), "--parameters=4e6", "--rounds=1", f"--tokenizer={TOKENIZER}"]
    assert consolidation.main(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("ours, float32", "ours, bfloat16", "DeepSpeed, float32", "cp of ours", "the same float32 values"):
        assert name in printed
    for column in ("on the disk after s", "with imports s", "peak MB", "of it anonymous", "memory / DeepSpeed's"):
        assert column in printed
    assert not folder.exists()


@pytest.mark.parametrize("parameters", [4e6, 5e8, 7e9])
def test_a_model_has_about_the_parameters_that_were_asked_for(parameters: float) -> None:
    with torch.device("meta"):
        found = sum(p.numel() for p in Decoder(decoder_of(parameters)).parameters())
    assert found == pytest.approx(parameters, rel=0.05)


def written(folder: Path, ours: dict[str, Tensor], half: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[Path]:
    for name, tensors in (("ours", ours), ("half", half)):
        write_checkpoint(folder / name, tensors, SphinxConfig(decoder_of(4e6)).to_dict(), {}, TOKENIZER, {})
    (folder / "theirs").mkdir()
    save_file({PREFIX + name: tensor for name, tensor in theirs.items()}, folder / "theirs/model.safetensors")
    return [folder / name for name in ("ours", "half", "theirs")]


def test_a_difference_is_found(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5), "b": torch.randn(3, 2)}
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert check(*written(tmp_path / "same", tensors, half, tensors)) == 2
    other = {**tensors, "b": torch.nextafter(tensors["b"], torch.tensor(9.0))}
    for number, (found, message) in enumerate(
        [
            ((tensors, half, other), "'b' is not the same in"),
            ((tensors, half, {"a": tensors["a"]}), "1 unexpected: 'b'"),
            ((tensors, half, {**tensors, "b": tensors["b"].bfloat16()}), "'b' is not the same in"),
            ((tensors, {**half, "a": half["a"] * 2}, tensors), "'a' in .* is not that in .*, rounded"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            check(*written(tmp_path / str(number), *found))
        shutil.rmtree(tmp_path / str(number))


def test_a_converter_that_fails_says_why(tmp_path: Path) -> None:
    command = ["python3", "-c", "raise SystemExit('no such checkpoint')"]
    with pytest.raises(UserError, match="failed: no such checkpoint"):
        consolidation.run(command, tmp_path / "out", tmp_path / "found")
