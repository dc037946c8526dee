"""Names of models of timm, open_clip and transformers lead to the hub's cache, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from sphinx_pl.checkpoints.encoders import load_pretrained
from sphinx_pl.models.config import VisionConfig
from sphinx_pl.models.vision import build_encoder
from sphinx_pl.utils.errors import UserError
from tests.checkpoints.conftest import cached
from tests.models.test_library_encoders import OPEN_CLIP, TRANSFORMERS, shuffled


def encoder_of(section: dict[str, Any]) -> Any:
    return build_encoder(VisionConfig({"own": section}, image_size=64), "own").eval()


def test_a_tag_of_timm(cache: Path) -> None:
    released = shuffled(timm.create_model("test_vit"))
    save_file(released.state_dict(), cached(cache, "timm/test_vit.r160_in1k", "model.safetensors"))
    encoder = encoder_of({"kind": "timm", "load": "test_vit.r160_in1k"})
    load_pretrained(encoder, encoder.config.load)
    views = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(encoder(views), released.forward_features(views))


def test_a_repository_of_open_clip(cache: Path) -> None:
    from open_clip.model import CustomTextCLIP

    settings = {"embed_dim": 8, "vision_cfg": OPEN_CLIP["vit"], "quick_gelu": True}
    text = {"context_length": 7, "vocab_size": 11, "width": 16, "heads": 2, "layers": 1}
    released = shuffled(CustomTextCLIP(**settings, text_cfg=text))  # type: ignore[arg-type]
    file = cached(cache, "me/clip", "open_clip_config.json")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    file.write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess}))
    save_file(released.state_dict(), cached(cache, "me/clip", "open_clip_model.safetensors"))
    encoder = encoder_of({"kind": "open_clip", "load": "hf-hub:me/clip"})
    assert encoder.mean == (0.1, 0.2, 0.3)
    load_pretrained(encoder, encoder.config.load)
    views = torch.randn(1, 3, 32, 32)
    visual: Any = released.visual
    with torch.no_grad():
        torch.testing.assert_close(encoder(views), visual.ln_post(visual.transformer(visual._embeds(views))))
    encoder.config.quick_gelu = False
    with pytest.raises(UserError, match=r"trained with quick_gelu=true: set model\.vision\.encoders\.own\.quick_gelu"):
        load_pretrained(encoder, encoder.config.load)


def test_a_repository_of_transformers(cache: Path) -> None:
    from transformers import AutoConfig, AutoModel

    released = shuffled(AutoModel.from_config(AutoConfig.for_model("dinov3_vit", **TRANSFORMERS["dinov3_vit"])))
    released.save_pretrained(cached(cache, "me/dino", "config.json").parent)
    processor = {"image_processor_type": "BitImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    cached(cache, "me/dino", "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = encoder_of({"kind": "transformers", "load": "me/dino"})
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    load_pretrained(encoder, encoder.config.load)
    views = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        tokens = released(pixel_values=views).last_hidden_state
        torch.testing.assert_close(encoder(views), torch.cat([tokens[:, :1], tokens[:, 5:]], 1))
    with pytest.raises(UserError, match=r"encoders\.own\.name=me/other is no configuration of transformers"):
        encoder_of({"kind": "transformers", "load": "me/other"})
