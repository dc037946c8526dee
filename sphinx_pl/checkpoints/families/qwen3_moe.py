"""Qwen 3 with experts in every layer."""

from typing import Any

from sphinx_pl.checkpoints.families.base import FAMILIES, Family
from sphinx_pl.checkpoints.families.keys import Keys
from sphinx_pl.models.config import DecoderConfig

_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Qwen3Moe(Family):
    """`Qwen3MoeForCausalLM`. Its window, where it has one, is in all layers."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    defaults = {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    layer = Family.layer | {
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
        "feed_forward.gate.weight": "mlp.gate.weight",
    }
    experts = {ours: f"mlp.experts.{{expert}}.{theirs}.weight" for ours, theirs in _MATRICES.items()}

    def options(self, keys: Keys) -> dict[str, Any]:
        if keys("decoder_sparse_step", 1) != 1:  # dense layers between the sparse ones
            raise keys.refuse("decoder_sparse_step")
        window = keys("sliding_window", 0)
        keys.without_effect("num_experts")
        return {
            "qk_norm": True,
            "ffn_width": keys["moe_intermediate_size"],
            "experts": keys("num_local_experts") or keys["num_experts"],
            "experts_per_token": keys["num_experts_per_tok"],
            "normalise_experts": keys("norm_topk_prob", False),
            "balance_weight": keys("router_aux_loss_coef", 0.0),
            "window": window if keys("use_sliding_window", False) else 0,
        }

    def keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "head_dim": config.head_dim,
            "attention_bias": False,
            "moe_intermediate_size": config.ffn_width,
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.normalise_experts,
            "router_aux_loss_coef": config.balance_weight,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": config.window > 0,
            "sliding_window": config.window or None,
        }


FAMILIES.register(Qwen3Moe.name, Qwen3Moe())
