"""InternLM 2 and 2.5: Meta's names, with queries, keys and values in one matrix by key/value head.

transformers has no class for it, so it is read and not written.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sphinx_pl.checkpoints.families.base import FAMILIES, Family
from sphinx_pl.models.config import DecoderConfig


class InternLM2(Family):
    """`InternLM2ForCausalLM` of its publisher's code."""

    name = "internlm2"
    architecture = ""
    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    top = {
        "tok_embeddings.weight": "model.tok_embeddings.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "output.weight",
    }
    layer = {}
    fused = {"attention.wqkv.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight")}

    def fuse(self, parts: Sequence[Tensor], config: DecoderConfig) -> Tensor:
        by_head = [torch.unflatten(part, 0, (config.kv_heads, -1, config.head_dim)) for part in parts]
        return torch.cat(by_head, dim=1).flatten(0, 2)

    def split(self, whole: Tensor, rows: Sequence[int], config: DecoderConfig) -> Sequence[Tensor]:
        by_head = torch.unflatten(whole, 0, (config.kv_heads, -1, config.head_dim))
        counts = [count // (config.kv_heads * config.head_dim) for count in rows]
        return [part.flatten(0, 2) for part in torch.split(by_head, counts, dim=1)]


FAMILIES.register(InternLM2.name, InternLM2())
