"""OLMo 2: norms behind attention and feed-forward, and over all heads' queries and keys."""

from typing import Any

from sphinx_pl.checkpoints.families.base import FAMILIES, Family
from sphinx_pl.checkpoints.families.keys import Keys


class Olmo2(Family):
    """`Olmo2ForCausalLM`."""

    name = "olmo2"
    architecture = "Olmo2ForCausalLM"
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
    layer = Family.layer | {
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
        "attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "post_feedforward_layernorm.weight",
    }

    def options(self, keys: Keys) -> dict[str, Any]:
        return {"qk_norm": True, "qk_norm_over": "width", "norm_position": "after"}


FAMILIES.register(Olmo2.name, Olmo2())
