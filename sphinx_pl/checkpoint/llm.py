"""Decoders alone, as their publishers ship them: Meta's LLaMA-2 files, and Hugging Face folders (also the way back).

Each is a checkpoint of a text-only model, so it can be shown, imported and named by `model.decoder.load`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.checkpoint.format import (
    CONFIG,
    FORMATS,
    TOKENIZER,
    Checkpoint,
    SafetensorsFile,
    Source,
    TensorInfo,
    Weights,
    read_json,
    read_provenance,
    sizes_of,
    write_json,
)
from sphinx_pl.checkpoint.huggingface import is_huggingface, weight_files
from sphinx_pl.checkpoint.layout import Entry, Layout, Whole, safetensors_layout, write_layout
from sphinx_pl.checkpoint.original import decoder_config
from sphinx_pl.checkpoint.parallel import ParallelFiles
from sphinx_pl.errors import UserError, suggest
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.models.decoder import Decoder

PARAMS = "params.json"


def _text_only(name: str, decoder: DecoderConfig) -> dict[str, Any]:
    return {"model": SphinxConfig(name=name, decoder=decoder, vision=None).to_dict(), "processor": {}}


class MetaCheckpoint(Checkpoint):
    """Meta's own folder of a LLaMA-2: params.json, consolidated.NN.pth; tokenizer.model is there or one folder up."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path / PARAMS).is_file() and bool(list(path.glob("consolidated.*.pth")))

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(path.glob("consolidated.*.pth"))
        expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(files))]
        if [file.name for file in files] != expected:
            raise UserError(f"'{path}' has {', '.join(file.name for file in files)}: expected {', '.join(expected)}")
        self._files = ParallelFiles(files, lambda content: content)
        # Precomputed angles, which every implementation computes itself.
        self._theirs = {f"decoder.{name}": name for name in self._files if name != "rope.freqs"}
        sizes = read_json(path / PARAMS)
        vocab = self._files.shape("tok_embeddings.weight")[0]
        with sizes_of(path / PARAMS):
            self.config = _text_only(path.name, decoder_config(sizes, vocab))
        self.provenance = {"original": "Meta"} | read_provenance(path)

    @property
    def parallel(self) -> ParallelFiles:
        """Its tensors as they lie in the files, under Meta's names."""
        return self._files

    def keys(self) -> Sequence[str]:
        return list(self._theirs)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._files.shape(self._theirs[name]), self._files.dtype(self._theirs[name]))

    def tensor(self, name: str) -> Tensor:
        return self._files.tensor(self._theirs[name])

    def files(self) -> Sequence[Path]:
        return [self.path / PARAMS, *self._files.files]

    @property
    def tokenizer_file(self) -> Path:
        here = self.path / TOKENIZER
        return here if here.is_file() else self.path.parent / TOKENIZER


FORMATS.register("meta", MetaCheckpoint)


# -- Hugging Face ----------------------------------------------------------------------------------------------------


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix: rotary channels as two halves (Hugging Face) -> as pairs (Meta, and here)."""
    return torch.unflatten(weight, 0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return torch.unflatten(weight, 0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_LLAMA_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_LAYER = {
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


def llama_source(name: str, config: DecoderConfig) -> Source:
    """`LlamaForCausalLM`, and `MixtralForCausalLM` with its experts."""
    if name in _LLAMA_TOP:
        return Source((_LLAMA_TOP[name],))
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    prefix, part = f"model.layers.{match[1]}", match[2]
    if part.startswith("attention.w") and part[11] in "qk":
        heads = config.heads if part[11] == "q" else config.kv_heads
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
    """`InternLM2ForCausalLM`: Meta's names, with queries, keys and values of each key/value head in one matrix."""
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


# Of a model that holds the decoder as a part, too.
_THEIR_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")


def our_llama_name(theirs: str) -> str:
    """Our name of a tensor of `LlamaForCausalLM` or of a model that names its tensors like it; else theirs."""
    ours = {value: key for key, value in (_LLAMA_TOP | _LLAMA_LAYER).items()}
    if theirs in _LLAMA_TOP.values():
        return f"decoder.{ours[theirs]}"
    match = _THEIR_LAYER.fullmatch(theirs)
    return f"decoder.layers.{match[1]}.{ours.get(match[2], match[2])}" if match else theirs


_FAMILIES: dict[str, Callable[[str, DecoderConfig], Source]] = {
    "llama": llama_source,
    "mixtral": llama_source,
    "internlm2": internlm2_source,
}


def _from_huggingface(values: dict[str, Any], file: Path) -> DecoderConfig:
    """Their config.json.

    Raises:
        UserError: it asks for something that the decoder here does not compute.
        KeyError: a size is missing.
    """
    heads = values["num_attention_heads"]
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    unlike = {
        "attention_bias": bool(values.get("attention_bias") or values.get("bias")),
        "rope_scaling": kind not in ("default", "dynamic"),  # dynamic: only beyond the trained length
        "head_dim": (values.get("head_dim") or values["hidden_size"] // heads) * heads != values["hidden_size"],
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "sliding_window": values.get("sliding_window") is not None,
    }
    if asked := [key for key, differs in unlike.items() if differs]:
        raise UserError(f"'{file}': {asked[0]}={values.get(asked[0])!r} is not what the decoder here computes")
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        ffn_width=values["intermediate_size"],
        norm_eps=values["rms_norm_eps"],
        rope_theta=float(values.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        max_positions=values.get("max_position_embeddings", 4096),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        experts=values.get("num_local_experts", 0),
        experts_per_token=values.get("num_experts_per_tok", 2),
        balance_weight=values.get("router_aux_loss_coef", 0.0) if values.get("num_local_experts") else 0.0,
    )


class HuggingFaceCheckpoint(Checkpoint):
    """A folder of safetensors that `from_pretrained` reads: LLaMA (TinyLlama too), Mixtral or InternLM2."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        return is_huggingface(path)

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path / CONFIG)
        kind = str(values["model_type"])
        if kind not in _FAMILIES:
            raise UserError(f"'{path / CONFIG}': model_type '{kind}' cannot be read: {suggest(kind, _FAMILIES)}")
        with sizes_of(path / CONFIG):
            decoder = _from_huggingface(values, path / CONFIG)
        self.config = _text_only(path.name, decoder)
        self.provenance = {"original": kind} | read_provenance(path)
        self._shards = [SafetensorsFile(path / name) for name in weight_files(path)]
        self._shard_of = {name: shard for shard in self._shards for name in shard.keys}
        with torch.device("meta"):
            wanted = list(Decoder(decoder).state_dict())
        self._sources = {name: _FAMILIES[kind](name, decoder) for name in wanted}
        used = {theirs for source in self._sources.values() for theirs in source.names}
        self._extra = [name for name in self._shard_of if name not in used and not name.endswith("rotary_emb.inv_freq")]

    def keys(self) -> Sequence[str]:
        found = [name for name, source in self._sources.items() if self._shard_of.keys() >= set(source.names)]
        return [*(f"decoder.{name}" for name in found), *self._extra]

    def info(self, name: str) -> TensorInfo:
        source = self._source(name)
        infos = [self._shard_of[theirs].info(theirs) for theirs in source.names]
        return TensorInfo(source.shape([info.shape for info in infos]), infos[0].dtype)

    def tensor(self, name: str) -> Tensor:
        source = self._source(name)
        return source.make(*(self._shard_of[theirs].tensor(theirs) for theirs in source.names))

    def _source(self, name: str) -> Source:
        return self._sources.get(name.removeprefix("decoder."), Source((name,)))

    def files(self) -> Sequence[Path]:
        return [self.path / CONFIG, *(shard.path for shard in self._shards)]

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER


FORMATS.register("huggingface", HuggingFaceCheckpoint)


class LlamaWeights:
    """The decoder of `weights` under the names of `LlamaForCausalLM` and with its order of rotary channels."""

    def __init__(self, weights: Weights, config: DecoderConfig) -> None:
        self._weights = weights
        self._config = config
        decoder = [name for name in weights if name.startswith("decoder.")]
        self._ours = {llama_source(name.removeprefix("decoder."), config).names[0]: name for name in decoder}

    def __iter__(self) -> Iterator[str]:
        return iter(self._ours)

    def info(self, name: str) -> TensorInfo:
        return self._weights.info(self._ours[name])

    def tensor(self, name: str) -> Tensor:
        tensor, rotate = self._weights.tensor(self._ours[name]), _rotated(name, self._config)
        return tensor if rotate is None else rotate(tensor)


def _rotated(name: str, config: DecoderConfig) -> Callable[[Tensor], Tensor] | None:
    """How the tensor of that name is made of ours, if it is another."""
    if name.endswith("q_proj.weight"):
        return lambda tensor: half_split(tensor, config.heads)
    return (lambda tensor: half_split(tensor, config.kv_heads)) if name.endswith("k_proj.weight") else None


def huggingface_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The config.json of `LlamaForCausalLM`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ffn_width,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }


def huggingface_layout(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Layout:
    """A folder that `LlamaForCausalLM.from_pretrained` loads: the decoder, made of tensors that go by our names.

    Args:
        dtype: of all tensors; None: each one's own.

    Raises:
        UserError: the decoder is no LLaMA, or there is no tokenizer.
    """
    config = checkpoint.model_config.decoder
    if config.qk_norm or config.experts:
        unlike = "qk_norm" if config.qk_norm else "experts"
        raise UserError(
            f"'{checkpoint.path}': LlamaForCausalLM has no {unlike}: this decoder cannot be exported as one"
        )
    entries = {}
    for name in checkpoint:
        if name.startswith("decoder."):
            theirs, info = llama_source(name.removeprefix("decoder."), config).names[0], checkpoint.info(name)
            here = TensorInfo(info.shape, dtype or info.dtype)
            entries[theirs] = Entry(here, name, _rotated(theirs, config), info.shape)
    tokenizer = checkpoint.tokenizer()
    said = str(dtype or checkpoint.info("decoder.norm.weight").dtype).removeprefix("torch.")

    def finish(folder: Path) -> None:
        write_json(folder / CONFIG, huggingface_config(config, said))
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})

    return safetensors_layout(entries, finish)


def write_huggingface(checkpoint: Checkpoint, out: Path) -> None:
    """Write the decoder of `checkpoint` in Hugging Face's layout.

    Raises:
        UserError: `out` exists, or see `huggingface_layout`.
    """
    write_layout(out, huggingface_layout(checkpoint), Whole(checkpoint.tensor), progress="Exporting")
