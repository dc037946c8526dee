"""The published sizes with random weights on a CPU: each encoder gives the tokens that the projection takes."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir

from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.vision import build_encoder
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER

pytestmark = pytest.mark.long

TOKENS = {"clip": (257, 1024), "convnext": (257, 3072), "dinov2": (257, 1536), "qformer": (32, 768)}


@torch.no_grad()
@pytest.mark.parametrize("kind", TOKENS)
def test_a_full_size_encoder_encodes_an_image(kind: str) -> None:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        vision = SphinxConfig.from_dict(compose("train", ["model=sphinx_13b"]).model).vision
    assert vision is not None
    encoder = build_encoder(vision, kind).eval()
    tokens = encoder(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    assert tokens.shape == (1, *TOKENS[kind])
    assert torch.isfinite(tokens).all()
