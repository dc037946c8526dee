"""Encoders that are not written since a file that the configuration names has them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.conftest import tiny_model

Write = Callable[..., Path]
CLIP = "mixer.towers.clip."


@pytest.fixture
def model(tmp_path: Path) -> Sphinx:
    """Its CLIP has a file of its own, which the configuration names."""
    torch.manual_seed(0)
    config = tiny_model()
    assert config.vision is not None
    config.vision.encoders["clip"].load = str(tmp_path / "clip.safetensors")
    model = Sphinx(config)
    assert model.mixer is not None
    save_file(model.mixer.towers["clip"].state_dict(), config.vision.encoders["clip"].load)
    return model


def source(config: SphinxConfig) -> Path:
    assert config.vision is not None
    return Path(str(config.vision.encoders["clip"].load))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_come_back_identical(write: Write, model: Sphinx, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    folder = write("a", weights, model=model.config.to_dict(), leave_out=["clip"], dtype=torch.float32)
    shards = [load_file(shard) for shard in folder.glob("*.safetensors")]
    assert not any(name.startswith(CLIP) for shard in shards for name in shard)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint) == set(weights)
    for name, value in weights.items():
        assert torch.equal(checkpoint.tensor(name).to(dtype), value), name
        assert checkpoint.info(name).shape == tuple(value.shape)
    repeat = Sphinx(checkpoint.model_config)
    checkpoint.load_into(repeat)
    assert all(torch.equal(value.to(dtype), weights[name]) for name, value in repeat.state_dict().items())


def test_an_encoder_that_has_changed_is_written(write: Write, model: Sphinx, caplog: pytest.LogCaptureFixture) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights[f"{CLIP}model.class_embedding"][3] += 1
    with caplog.at_level(logging.WARNING):
        folder = write("a", weights, model=model.config.to_dict(), leave_out=["clip"])
    assert "the encoder 'clip' is kept: 'mixer.towers.clip.model.class_embedding'" in caplog.text
    source(model.config).unlink()
    checkpoint = open_checkpoint(folder)
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in weights.items())


def test_a_source_that_is_gone_or_holds_something_else_is_noticed(write: Write, model: Sphinx) -> None:
    folder = write("a", model.state_dict(), model=model.config.to_dict(), leave_out=["clip"])
    file = source(model.config)
    other = load_file(file)
    other["model.ln_pre.bias"][0] += 1
    save_file(other, file)
    checkpoint = open_checkpoint(folder)
    checkpoint.tensor(f"{CLIP}model.ln_post.bias")
    with pytest.raises(UserError, match=r"leaves 'mixer.towers.clip.model.ln_pre.bias' to .* another value now"):
        checkpoint.tensor(f"{CLIP}model.ln_pre.bias")
    file.unlink()
    with pytest.raises(UserError, match=r"model\.vision\.encoders\.clip\.load=.*clip\.safetensors"):
        open_checkpoint(folder).tensor(f"{CLIP}model.ln_pre.bias")


@pytest.mark.parametrize(
    "damage", [{"shape": "x"}, {"dtype": "F99"}, {"crc32": None}, {}], ids=["shape", "dtype", "crc32", "nothing"]
)
def test_damaged_entries_are_answered_in_one_line(write: Write, model: Sphinx, damage: dict[str, object]) -> None:
    folder = write("a", model.state_dict(), model=model.config.to_dict(), leave_out=["clip"])
    config = json.loads((folder / "config.json").read_text())
    name = next(iter(config["left_out"]))
    config["left_out"][name] = config["left_out"][name] | damage if damage else {}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json"):
        open_checkpoint(folder)
