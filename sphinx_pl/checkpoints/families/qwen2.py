"""Qwen 2 and 2.5: LLaMA with biases on queries, keys and values."""

from typing import Any

from sphinx_pl.checkpoints.families.base import FAMILIES, Family, layers_with_window, window_keys
from sphinx_pl.checkpoints.families.keys import Keys
from sphinx_pl.models.config import DecoderConfig


class Qwen2(Family):
    """`Qwen2ForCausalLM`."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults = {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
    layer = Family.layer | {f"attention.w{kind}.bias": f"self_attn.{kind}_proj.bias" for kind in "qkv"}

    def options(self, keys: Keys) -> dict[str, Any]:
        return {"qkv_bias": True} | layers_with_window(keys, keys("max_window_layers", 0))

    def keys(self, config: DecoderConfig) -> dict[str, Any]:
        return window_keys(config)


FAMILIES.register(Qwen2.name, Qwen2())
