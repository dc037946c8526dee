"""Mixtral: Mistral with experts."""

from typing import Any

from sphinx_pl.checkpoints.families.base import FAMILIES, Family
from sphinx_pl.checkpoints.families.keys import Keys
from sphinx_pl.models.config import DecoderConfig


class Mixtral(Family):
    """`MixtralForCausalLM`."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    defaults = {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    layer = Family.layer | {"feed_forward.gate.weight": "block_sparse_moe.gate.weight"}
    experts = {matrix: f"block_sparse_moe.experts.{{expert}}.{matrix}.weight" for matrix in ("w1", "w2", "w3")}

    def options(self, keys: Keys) -> dict[str, Any]:
        return {
            "experts": keys["num_local_experts"],
            "experts_per_token": keys["num_experts_per_tok"],
            "balance_weight": keys("router_aux_loss_coef", 0.0),
            "window": keys("sliding_window", 0),
        }

    def keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "num_local_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "router_aux_loss_coef": config.balance_weight,
            "sliding_window": config.window or None,
        }


FAMILIES.register(Mixtral.name, Mixtral())
