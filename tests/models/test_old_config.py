"""Configurations of older versions, whose encoders are keys of `model.vision` itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.conftest import tiny_model

# A config.json as older versions write it.
OLD: dict[str, Any] = {
    "name": "tiny",
    "decoder": {
        "vocab_size": 512, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 96, "norm_eps": 1e-05,
        "rope_theta": 10000.0, "max_positions": 512, "qk_norm": True, "tie_embeddings": True, "experts": 0,
        "experts_per_token": 2, "balance_weight": 0.0, "load": None,
    },
    "vision": {
        "image_size": 32, "grid": 1,
        "clip": {
            "image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2, "mlp_ratio": 4.0,
            "quick_gelu": True, "load": None,
        },
        "convnext": {
            "image_size": 32, "view_size": None, "depths": [1, 1], "dims": [16, 32], "stem": 4, "load": None,
        },
        "dinov2": {
            "image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2, "mlp_ratio": 5.33334,
            "position_grid": None, "load": None,
        },
        "qformer": {
            "image_size": 32, "patch_size": 8, "vision_width": 32, "vision_layers": 1, "vision_heads": 2,
            "vision_ffn_width": 64, "queries": 2, "width": 32, "layers": 2, "heads": 2, "ffn_width": 64,
            "cross_attention_every": 2, "load": None,
        },
        "merge": "shuffle", "merge_factor": 2, "merge_overview": True, "skip_padding": False, "half_resize": False,
    },
    "image_position": "after_bos",
}  # fmt: skip


@pytest.mark.parametrize("make", [copy.deepcopy, OmegaConf.create])
def test_it_means_the_same(make: Callable[[dict[str, Any]], Any]) -> None:
    old = make(OLD)
    assert SphinxConfig.from_dict(old) == tiny_model()
    assert old == OLD


def test_an_encoder_that_is_null_is_absent() -> None:
    config = SphinxConfig.from_dict(OLD | {"vision": OLD["vision"] | {"clip": None, "dinov2": None}})
    assert config.vision is not None
    assert list(config.vision.encoders) == ["convnext", "qformer"]


def test_old_and_new_keys_side_by_side_are_refused() -> None:
    values = tiny_model().to_dict()
    values["vision"]["clip"] = {"load": "x"}
    with pytest.raises(UserError) as caught:
        SphinxConfig.from_dict(values)
    assert str(caught.value) == "model.vision.clip.load is called model.vision.encoders.clip.load now"


def test_a_checkpoint_of_an_older_version_loads(models: Callable[..., list[Path]]) -> None:
    [folder] = models(1)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": OLD}))
    checkpoint = open_checkpoint(folder)
    model = Sphinx(checkpoint.model_config)
    checkpoint.load_into(model)
    names = ("mixer.towers.clip.model.conv1.weight", "mixer.qformer_proj.0.weight", "mixer.visual_proj.1.bias")
    for name in names:
        assert (model.get_parameter(name) == checkpoint.tensor(name)).all()
