"""Phi 3, 3.5 and 4: fused matrices, longrope's frequencies and partly rotated heads."""

from typing import Any

from sphinx_pl.checkpoints.families.base import FAMILIES, Family
from sphinx_pl.checkpoints.families.keys import Keys
from sphinx_pl.models.config import DecoderConfig


class Phi3(Family):
    """`Phi3ForCausalLM`."""

    name = "phi3"
    architecture = "Phi3ForCausalLM"
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    fused = {
        "self_attn.qkv_proj.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
        "mlp.gate_up_proj.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
    }
    rotates_partly = True

    def rotary(self, keys: Keys, head_dim: int) -> dict[str, Any]:
        options = super().rotary(keys, head_dim)
        if (scaling := options.get("rope_scaling")) and scaling["kind"] != "longrope":
            raise keys.refuse("rope_parameters" if keys("rope_parameters") else "rope_scaling")
        return options

    def options(self, keys: Keys) -> dict[str, Any]:
        return {"window": keys("sliding_window", 0)}

    def keys(self, config: DecoderConfig) -> dict[str, Any]:
        scaling = config.rope_scaling
        return {
            "sliding_window": config.window or None,
            "original_max_position_embeddings": scaling.original_positions if scaling else config.max_positions,
        }


FAMILIES.register(Phi3.name, Phi3())
