"""Qwen 3: LLaMA with normalised queries and keys, and heads whose size the width does not give."""

from typing import Any

from sphinx_pl.checkpoints.families.base import FAMILIES, Family, layers_with_window, window_keys
from sphinx_pl.checkpoints.families.keys import Keys
from sphinx_pl.models.config import DecoderConfig


class Qwen3(Family):
    """`Qwen3ForCausalLM`."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults = {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
    layer = Family.layer | {f"attention.{kind}_norm.weight": f"self_attn.{kind}_norm.weight" for kind in "qk"}

    def options(self, keys: Keys) -> dict[str, Any]:
        return {"qk_norm": True} | layers_with_window(keys, keys("max_window_layers", 0))

    def keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {"head_dim": config.head_dim, "attention_bias": False} | window_keys(config)


FAMILIES.register(Qwen3.name, Qwen3())
