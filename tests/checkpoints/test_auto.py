"""`model=auto`: a decoder that takes its options from its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from sphinx_pl.checkpoints.auto import fill_decoder
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.runtime.overrides import compose_config
from sphinx_pl.settings.train import check_train
from sphinx_pl.utils.config import CONFIG_FOLDER
from sphinx_pl.utils.errors import UserError
from tests.checkpoints.test_families import reference


def model(*overrides: str) -> DictConfig:
    section: Any = compose_config(CONFIG_FOLDER, "train", ["model=auto", *overrides]).model
    return OmegaConf.create(OmegaConf.to_container(section))  # type: ignore[return-value]


def test_the_decoder_is_that_of_its_weights(tmp_path: Path) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    reference("qwen2", changes).save_pretrained(tmp_path)
    section = model(f"model.decoder.load={tmp_path}", "model.vision.grid=1")
    fill_decoder(section)
    config = SphinxConfig.from_dict(section)
    decoder = config.decoder
    assert (decoder.width, decoder.qkv_bias, decoder.window, decoder.window_layers) == (48, True, 7, [1, 2])
    assert (decoder.max_positions, decoder.load) == (64, str(tmp_path))
    assert config.vision is not None
    again = section.copy()
    fill_decoder(again)  # a run folder's configuration needs the weights no more
    assert again == section

    short = model(f"model.decoder.load={tmp_path}", "model.decoder.max_positions=32")
    fill_decoder(short)
    assert short.decoder.max_positions == 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"model\.decoder\.auto=true takes .*name them with model\.decoder\.load=FOLDER"),
        (["model.decoder.load=nowhere"], r"model\.decoder\.load=nowhere: checkpoint 'nowhere' does not exist"),
    ],
)
def test_weights_that_are_not_there(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fill_decoder(model(*overrides))


def test_train_fills_it_in_before_anything_reads_it(tmp_path: Path) -> None:
    reference("olmo2", {}).save_pretrained(tmp_path)
    overrides = ["model=auto", f"model.decoder.load={tmp_path}", "data.root=nowhere"]
    cfg = compose_config(CONFIG_FOLDER, "train", overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    check_train(cfg)
    assert cfg.model.decoder.norm_position == "after"
    assert "auto" not in cfg.model.decoder
