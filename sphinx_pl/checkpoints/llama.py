"""Decoders alone, as their publishers ship them: Meta's LLaMA-2 files, and Hugging Face folders (also the way back).

Each is a checkpoint of a text-only model, so it can be shown, imported and named by `model.decoder.load`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_pl.checkpoints.format import (
    CONFIG,
    FORMATS,
    TOKENIZER,
    Checkpoint,
    SafetensorsFile,
    TensorInfo,
    Weights,
    read_json,
    read_provenance,
    same_bits,
    sizes_of,
    write_json,
)
from sphinx_pl.checkpoints.huggingface import is_huggingface, weight_files
from sphinx_pl.checkpoints.layout import Entry, Layout, Whole, safetensors_layout, write_layout
from sphinx_pl.checkpoints.original import decoder_config
from sphinx_pl.checkpoints.tokenizer_json import TOKENIZER_CONFIG, TOKENIZER_JSON, tokenizer_json
from sphinx_pl.checkpoints.torch_shards import ParallelFiles
from sphinx_pl.checkpoints.unreadable import check_plain
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.models.decoder import Decoder
from sphinx_pl.models.published import Source
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import write_whole

PARAMS = "params.json"
_META_SHARD = re.compile(r"consolidated\.\d\d\.pth")
_META_QUERIES = "layers.0.attention.wq.weight"


def _text_only(name: str, decoder: DecoderConfig) -> dict[str, Any]:
    return {"model": SphinxConfig(name=name, decoder=decoder, vision=None).to_dict(), "processor": {}}


class MetaCheckpoint(Checkpoint):
    """Meta's own folder of a LLaMA-2: params.json, consolidated.NN.pth; tokenizer.model is there or one folder up."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path / PARAMS).is_file() and any(_META_SHARD.fullmatch(file.name) for file in path.iterdir())

    def __init__(self, path: Path) -> None:
        self.path = path
        files = {file.name: file for file in sorted(path.iterdir()) if _META_SHARD.fullmatch(file.name)}
        self._files = ParallelFiles(list(files.values()), lambda content: content)
        sizes = read_json(path / PARAMS)
        with sizes_of(path / PARAMS):
            # Each file has equally many rows of a query matrix.
            rows = self._files.stored_info(_META_QUERIES).shape[0] if _META_QUERIES in self._files else sizes["dim"]
            total = max(sizes["dim"] // rows, *(int(name.split(".")[1]) + 1 for name in files))
            names = (f"consolidated.{rank:02d}.pth" for rank in range(total))
        if missing := next((name for name in names if name not in files), None):
            raise UserError(f"'{path / missing}' is missing: copy all {total} shards of this model")
        # Precomputed angles, which every implementation computes itself.
        self._theirs = {f"decoder.{name}": name for name in self._files if name != "rope.freqs"}
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
    """Heads in the first dimension of a layer's tensor if that has rotary channels; 0 if it has none.

    A norm of queries or keys has the channels of one head.
    """
    kind = part.removeprefix("attention.").removesuffix(".weight")
    return {"wq": config.heads, "wk": config.kv_heads, "q_norm": 1, "k_norm": 1}.get(kind, 0)


def llama_source(name: str, config: DecoderConfig) -> Source:
    """`LlamaForCausalLM`, `Qwen3ForCausalLM` with its query and key norms, `MixtralForCausalLM` with its experts."""
    if name in _LLAMA_TOP:
        return Source((_LLAMA_TOP[name],))
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
    "qwen3": llama_source,
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
        "sliding_window": values.get("use_sliding_window", True) and values.get("sliding_window") is not None,
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
        qk_norm=values["model_type"] == "qwen3",
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
        stored = {name: shard for shard in self._shards for name in shard.keys}
        check_plain(path, values, stored, "read")
        with torch.device("meta"):
            wanted = list(Decoder(decoder).state_dict())
        sources = {name: _FAMILIES[kind](name, decoder) for name in wanted}
        used = {theirs for source in sources.values() for theirs in source.names}
        # Saved from the class without an output head (LlamaModel), names lack their beginning.
        bare = not used & stored.keys() and any(f"model.{name}" in used for name in stored)
        self._prefix = "model." if bare else ""
        self._shard_of = {f"{self._prefix}{name}": shard for name, shard in stored.items()}
        self._sources = {f"decoder.{name}": source for name, source in sources.items()}
        self._extra = [name for name in self._shard_of if name not in used and not self._is_repeated(name)]

    def _is_repeated(self, theirs: str) -> bool:
        """Whether a tensor says nothing new: angles that are computed, or an output head that is the embedding."""
        if theirs.endswith("rotary_emb.inv_freq"):
            return True
        if theirs != _LLAMA_TOP["output.weight"] or not self.model_config.decoder.tie_embeddings:
            return False
        embedding = _LLAMA_TOP["tok_embeddings.weight"]
        return embedding in self._shard_of and same_bits(self._stored(theirs), self._stored(embedding))

    def _stored(self, theirs: str) -> Tensor:
        return self._shard_of[theirs].tensor(theirs.removeprefix(self._prefix))

    def check(self, module: nn.Module, part: str = "") -> None:
        if self._prefix and "decoder.output.weight" in self._sources:
            raise UserError(
                f"'{self.path}' has no output head (lm_head.weight): it was saved from LlamaModel or its like, save it "
                "from LlamaForCausalLM"
            )
        super().check(module, part)

    def keys(self) -> Sequence[str]:
        found = [name for name, source in self._sources.items() if self._shard_of.keys() >= set(source.names)]
        return [*found, *self._extra]

    def info(self, name: str) -> TensorInfo:
        source = self._source(name)
        infos = [self._shard_of[theirs].info(theirs.removeprefix(self._prefix)) for theirs in source.names]
        return TensorInfo(source.shape([info.shape for info in infos]), infos[0].dtype)

    def tensor(self, name: str) -> Tensor:
        source = self._source(name)
        return source.make(*(self._stored(theirs) for theirs in source.names))

    def _source(self, name: str) -> Source:
        return self._sources.get(name, Source((name,)))

    def files(self) -> Sequence[Path]:
        return [self.path / CONFIG, *(shard.path for shard in self._shards)]

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER


FORMATS.register("huggingface", HuggingFaceCheckpoint)


class LlamaWeights:
    """The decoder of `weights` under the names of `family(config)` and with its order of rotary channels."""

    def __init__(self, weights: Weights, config: DecoderConfig) -> None:
        self._weights = weights
        self._entries = dict(_entries(weights, config))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def info(self, name: str) -> TensorInfo:
        return self._entries[name].info

    def tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        assert entry.key is not None
        tensor = self._weights.tensor(entry.key)
        return tensor if entry.make is None else entry.make(tensor)


def _entries(weights: Weights, config: DecoderConfig, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Entry]]:
    """Their names of the decoder's tensors, and how each is made of ours."""
    for name in weights:
        if not name.startswith("decoder."):
            continue
        info = weights.info(name)
        source = llama_source(name.removeprefix("decoder."), config)
        part = name.partition(".layers.")[2].partition(".")[2]
        if len(source.names) == 1:
            heads = _rotary_heads(part, config)
            make = partial(half_split, heads=heads) if heads else None
            yield source.names[0], Entry(TensorInfo(info.shape, dtype or info.dtype), name, make, info.shape)
            continue
        rows, width = info.shape[0] // config.experts, info.shape[1]
        turned = part.endswith("w2")
        here = TensorInfo((width, rows) if turned else (rows, width), dtype or info.dtype)
        for expert, theirs in enumerate(source.names):
            yield theirs, Entry(here, name, partial(_expert, place=expert, rows=rows, turned=turned), info.shape)


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


def huggingface_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The config.json of `family(config)`."""
    name = family(config)
    more: dict[str, Any] = {}
    if config.qk_norm:
        more = {"head_dim": config.head_dim, "attention_bias": False, "use_sliding_window": False}
    elif config.experts:
        more = {"num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token}
        more |= {"router_aux_loss_coef": config.balance_weight, "sliding_window": None}
    return {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
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
    } | more


def huggingface_layout(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Layout:
    """A folder that `family(config).from_pretrained` loads: the decoder, made of tensors that go by our names.

    Args:
        dtype: of all tensors; None: each one's own.

    Raises:
        UserError: no class of transformers computes the decoder, or there is no tokenizer, or none that it cuts alike.
    """
    config = checkpoint.model_config.decoder
    try:
        family(config)
    except ValueError as error:
        raise UserError(f"'{checkpoint.path}' has {error}, which is not exported to Hugging Face's layout") from None
    entries = dict(_entries(checkpoint, config, dtype))
    tokenizer = checkpoint.tokenizer()
    text, settings = tokenizer_json(tokenizer)
    said = str(dtype or checkpoint.info("decoder.norm.weight").dtype).removeprefix("torch.")

    def finish(folder: Path) -> None:
        write_json(folder / CONFIG, huggingface_config(config, said))
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        write_whole(folder / TOKENIZER_JSON, text)
        write_json(folder / TOKENIZER_CONFIG, settings)

    return safetensors_layout(entries, finish)


def write_huggingface(checkpoint: Checkpoint, out: Path) -> None:
    """Write the decoder of `checkpoint` in Hugging Face's layout.

    Raises:
        UserError: `out` exists, or see `huggingface_layout`.
    """
    read = lru_cache(1)(checkpoint.tensor)  # the experts of one matrix come one after the other
    write_layout(out, huggingface_layout(checkpoint), Whole(read), progress="Exporting")
