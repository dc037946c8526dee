"""Mistral 7B and Nemo: LLaMA with a sliding window in all layers."""

from typing import Any

from sphinx_pl.checkpoints.families.base import FAMILIES, Family
from sphinx_pl.checkpoints.families.keys import Keys
from sphinx_pl.models.config import DecoderConfig


class Mistral(Family):
    """`MistralForCausalLM`."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    defaults = {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }

    def options(self, keys: Keys) -> dict[str, Any]:
        return {"window": keys("sliding_window", 0)}

    def keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {"sliding_window": config.window or None}


FAMILIES.register(Mistral.name, Mistral())
