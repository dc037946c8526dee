"""Decoders under the names that transformers gives LLaMA and its relatives, and with its order of
rotary channels.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.checkpoints.output import Entry
from sphinx_pl.checkpoints.tensors import Source, TensorInfo, TensorReader
from sphinx_pl.models.config import DecoderConfig, SphinxConfig


def text_only(name: str, decoder: DecoderConfig) -> dict[str, Any]:
    """The configuration of a checkpoint that is a decoder alone."""
    return {"model": SphinxConfig(name=name, decoder=decoder, vision=None).to_dict(), "processor": {}}


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys: rotary channels as halves (Hugging Face) -> as pairs (here)."""
    return torch.unflatten(weight, 0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return torch.unflatten(weight, 0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
LLAMA_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_LAYER = {
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def _rotary_heads(part: str, config: DecoderConfig) -> int:
    """Heads in the first dimension of a layer's tensor if that has rotary channels; 0 if it has
    none.

    A norm of queries or keys has the channels of one head.
    """
    kind = part.removeprefix("attention.").removesuffix(".weight")
    return {"wq": config.heads, "wk": config.kv_heads, "q_norm": 1, "k_norm": 1}.get(kind, 0)


def llama_source(name: str, config: DecoderConfig) -> Source:
    """Names of LLaMA, of Qwen3 with query and key norms, of Mixtral with experts."""
    if name in LLAMA_TOP:
        return Source((LLAMA_TOP[name],))
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    prefix, part = f"model.layers.{match[1]}", match[2]
    if heads := _rotary_heads(part, config):
        return Source((f"{prefix}.{_LLAMA_LAYER[part]}",), lambda weight: interleave(weight, heads))
    if part in _LLAMA_LAYER:
        return Source((f"{prefix}.{_LLAMA_LAYER[part]}",))
    moe = f"{prefix}.block_sparse_moe"
    if part == "feed_forward.gate.weight":
        return Source((f"{moe}.gate.weight",))
    matrix = part.removeprefix("feed_forward.")
    names = tuple(f"{moe}.experts.{expert}.{matrix}.weight" for expert in range(config.experts))
    if matrix == "w2":
        return Source(names, lambda *experts: torch.cat([expert.T for expert in experts]))
    return Source(names, lambda *experts: torch.cat(experts))


def internlm2_source(name: str, config: DecoderConfig) -> Source:
    """Meta's names, with queries, keys and values of each key/value head in one matrix."""
    if not (match := _LAYER.fullmatch(name)):
        return Source(("output.weight" if name == "output.weight" else f"model.{name}",))
    layer, part = match.groups()
    if (kind := part.removeprefix("attention.w").removesuffix(".weight")) not in ("q", "k", "v"):
        return Source((f"model.{name}",))

    def part_of(fused: Tensor) -> Tensor:
        groups = config.heads // config.kv_heads
        by_head = torch.unflatten(fused, 0, (config.kv_heads, groups + 2, config.head_dim))
        chosen = {"q": slice(0, groups), "k": slice(-2, -1), "v": slice(-1, None)}[kind]
        weight = by_head[:, chosen].flatten(0, 2)
        return weight if kind == "v" else interleave(weight, config.heads if kind == "q" else config.kv_heads)

    return Source((f"model.layers.{layer}.attention.wqkv.weight",), part_of)


# A layer's tensor; also of a model that holds the decoder as a part.
_THEIR_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")


def our_llama_name(theirs: str) -> str:
    """The canonical name of a tensor that is named as in `LlamaForCausalLM`; else theirs."""
    ours = {value: key for key, value in (LLAMA_TOP | _LLAMA_LAYER).items()}
    if theirs in LLAMA_TOP.values():
        return f"decoder.{ours[theirs]}"
    match = _THEIR_LAYER.fullmatch(theirs)
    return f"decoder.layers.{match[1]}.{ours.get(match[2], match[2])}" if match else theirs


def llama_entries(reader: TensorReader, config: DecoderConfig, dtype: torch.dtype | None = None) -> dict[str, Entry]:
    """The decoder's tensors under the names of `family(config)`, and how each is made of a
    canonical one.

    Args:
        dtype: of all tensors; None: each one's own.
    """
    entries: dict[str, Entry] = {}
    for name in reader:
        if not name.startswith("decoder."):
            continue
        info = reader.info(name)
        source = llama_source(name.removeprefix("decoder."), config)
        part = name.partition(".layers.")[2].partition(".")[2]
        if len(source.names) == 1:
            heads = _rotary_heads(part, config)
            make = partial(half_split, heads=heads) if heads else None
            entries[source.names[0]] = Entry(TensorInfo(info.shape, dtype or info.dtype), name, make, info.shape)
            continue
        rows, width = info.shape[0] // config.experts, info.shape[1]
        turned = part.endswith("w2")
        here = TensorInfo((width, rows) if turned else (rows, width), dtype or info.dtype)
        for expert, theirs in enumerate(source.names):
            cut = partial(_expert, place=expert, rows=rows, turned=turned)
            entries[theirs] = Entry(here, name, cut, info.shape)
    return entries


def _expert(matrix: Tensor, place: int, rows: int, turned: bool) -> Tensor:
    """One expert's [rows, D] of the matrix [experts * rows, D] of all; `turned`: [D, rows]."""
    own = matrix[place * rows : (place + 1) * rows]
    return own.T.contiguous() if turned else own


def family(config: DecoderConfig) -> str:
    """The class of transformers that computes what this decoder does.

    Raises:
        ValueError: there is none that this project writes.
    """
    if config.qk_norm and config.experts:
        raise ValueError("qk_norm and experts together")
    return "Qwen3ForCausalLM" if config.qk_norm else "MixtralForCausalLM" if config.experts else "LlamaForCausalLM"
