"""What a family of language models is: names of tensors, and the meaning of its config.json.

The base class is LLaMA's; another family states where it differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sphinx_pl.checkpoints.families.keys import Keys
from sphinx_pl.checkpoints.output import Entry
from sphinx_pl.checkpoints.tensors import TensorInfo, TensorReader
from sphinx_pl.models.config import DecoderConfig, RopeScaling
from sphinx_pl.models.published import Source
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.registry import Registry

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def interleave(rows: Tensor, heads: int, rotary_dim: int = 0) -> Tensor:
    """Rows of queries or keys: rotary channels as halves (Hugging Face) -> as pairs (here).

    Args:
        rows: weights [heads * h, D], or biases or norms [heads * h].
        rotary_dim: channels of a head that are rotated, which come first; 0: all.
    """
    return _reorder(rows, heads, rotary_dim, lambda channels: torch.unflatten(channels, 1, (2, -1)))


def half_split(rows: Tensor, heads: int, rotary_dim: int = 0) -> Tensor:
    """The inverse of `interleave`."""
    return _reorder(rows, heads, rotary_dim, lambda channels: torch.unflatten(channels, 1, (-1, 2)))


def _reorder(rows: Tensor, heads: int, rotary_dim: int, grid: Callable[[Tensor], Tensor]) -> Tensor:
    by_head = torch.unflatten(rows, 0, (heads, -1))
    rotated, rest = by_head.tensor_split([rotary_dim or by_head.shape[1]], dim=1)
    reordered = grid(rotated).transpose(1, 2).flatten(1, 2)
    return (torch.cat([reordered, rest], dim=1) if rest.shape[1] else reordered).flatten(0, 1)


class Family:
    """LLaMA. A subclass states what its family has instead.

    Names of a layer's tensors stand without the layer's prefix: `attention.wq.weight` here is
    `self_attn.q_proj.weight` there.
    """

    name: ClassVar[str] = "llama"
    """`model_type` in config.json."""
    architecture: ClassVar[str] = "LlamaForCausalLM"
    """The class of transformers; "" for a family that transformers lacks, which is not exported."""
    defaults: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    """What the class takes for keys that a config.json leaves out."""

    top: ClassVar[Mapping[str, str]] = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    """Names outside of the layers: ours -> theirs."""
    layer: ClassVar[dict[str, str]] = {
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
    """Names of a layer's tensors: ours -> theirs."""
    fused: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """A layer's tensors that hold several of ours: theirs -> ours, see `fuse`."""
    experts: ClassVar[Mapping[str, str]] = {}
    """Experts' matrices: ours (`w1`) -> theirs, with `{expert}` in it."""

    # -- configuration --

    def options(self, keys: Keys) -> dict[str, Any]:
        """The options of `DecoderConfig` that this family's own keys set."""
        return {}

    def keys(self, config: DecoderConfig) -> dict[str, Any]:
        """This family's own keys, the inverse of `options`."""
        return {}

    def decoder(self, values: Mapping[str, Any]) -> DecoderConfig:
        """The decoder that a config.json describes.

        Raises:
            UserError: it asks for something that the decoder here does not compute, or has a value
                that cannot be.
            KeyError: a size is missing.
        """
        keys = Keys(values, self.defaults)
        width, heads = keys["hidden_size"], keys["num_attention_heads"]
        head_dim = keys("head_dim") or width // heads
        options = {
            "vocab_size": keys["vocab_size"],
            "width": width,
            "layers": keys["num_hidden_layers"],
            "heads": heads,
            "kv_heads": keys("num_key_value_heads", heads),
            "head_size": head_dim,
            "ffn_width": keys["intermediate_size"],
            "norm_eps": keys["rms_norm_eps"],
            "max_positions": keys["max_position_embeddings"],
            "tie_embeddings": keys("tie_word_embeddings", False),
        }
        options |= self.rotary(keys, head_dim)
        options |= self.options(keys)
        keys.check_rest()
        return build(DecoderConfig, options, "model.decoder")

    def rotary(self, keys: Keys, head_dim: int) -> dict[str, Any]:
        """The options of rotary embeddings.

        Both forms of config.json are read: `rope_scaling` beside `rope_theta`, and
        `rope_parameters`.
        """
        section = "rope_parameters" if keys("rope_parameters") else "rope_scaling"
        rope = Keys(keys(section, {}), {}, f"{section}.")
        keys.without_effect("rope_scaling")  # where both are there, they say the same
        kind, old_kind = rope("rope_type"), rope("type", "default")
        kind = {"su": "longrope"}.get(kind or old_kind, kind or old_kind)
        share = rope("partial_rotary_factor", keys("partial_rotary_factor", 1.0))
        if share != 1 and not self.rotates_partly:
            raise (rope if rope("partial_rotary_factor") else keys).refuse("partial_rotary_factor")
        options: dict[str, Any] = {
            "rope_theta": float(rope("rope_theta", keys("rope_theta", 10000.0))),
            "rotary_size": int(head_dim * share),
        }
        # Phi 3 has it beside the section, where it comes first.
        places = (keys, rope)
        original = next(filter(None, [place("original_max_position_embeddings") for place in places]), None)
        original = original or keys["max_position_embeddings"]
        if kind == "dynamic":
            rope.without_effect("factor")  # only beyond max_positions, which nothing here exceeds
        elif kind == "linear":
            options["rope_scaling"] = {"kind": kind, "factor": float(rope["factor"])}
        elif kind == "llama3":
            options["rope_scaling"] = {
                "kind": kind,
                "factor": float(rope["factor"]),
                "original_positions": original,
                "low_freq_factor": float(rope["low_freq_factor"]),
                "high_freq_factor": float(rope["high_freq_factor"]),
            }
        elif kind in ("yarn", "longrope"):
            factor = float(rope("factor") or keys["max_position_embeddings"] / original)
            scaling = {"kind": kind, "factor": factor, "original_positions": original}
            if (attention_factor := rope("attention_factor")) is not None:
                scaling["attention_factor"] = float(attention_factor)
            if kind == "yarn":
                scaling["beta_fast"] = float(rope("beta_fast") or 32)
                scaling["beta_slow"] = float(rope("beta_slow") or 1)
                scaling["truncate"] = rope("truncate", True)
                if rope("mscale") and rope("mscale_all_dim") and attention_factor is None:
                    raise rope.refuse("mscale")
            else:
                scaling["short_factor"] = [float(divisor) for divisor in rope["short_factor"]]
                scaling["long_factor"] = [float(divisor) for divisor in rope["long_factor"]]
            options["rope_scaling"] = scaling
        elif kind != "default":
            raise keys.refuse(section)
        rope.check_rest(())
        return options

    rotates_partly: ClassVar[bool] = False
    """Whether the class of transformers rotates fewer channels than a head has."""

    def config(self, config: DecoderConfig) -> dict[str, Any]:
        """The config.json of a decoder, the inverse of `decoder` where this family computes it."""
        values = {
            "architectures": [self.architecture],
            "model_type": self.name,
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
            "pad_token_id": None,  # a class has that of its own vocabulary, which may be larger
        }
        if config.head_size:
            values["head_dim"] = config.head_dim
        if config.rotary_size:
            values["partial_rotary_factor"] = config.rotary_dim / config.head_dim
        if config.rope_scaling is not None:
            values["rope_scaling"] = _rope_section(config.rope_scaling)
        return values | self.keys(config)

    def lacks(self, config: DecoderConfig) -> list[str]:
        """The options of a decoder that this family has not: "qk_norm=True", say."""
        try:
            same = self.decoder(self.config(config))
        except UserError as error:
            return [str(error)]
        ours, theirs = (vars(replace(each, load=None, balance_weight=0.0)) for each in (config, same))
        return [f"{key}={value!r}" for key, value in ours.items() if value != theirs[key]]

    # -- tensors --

    def source(self, name: str, config: DecoderConfig) -> Source:
        """Where a tensor of `Decoder` stands in the family's files, and how it is made."""
        if name in self.top:
            return Source((self.top[name],))
        match = _LAYER.fullmatch(name)
        assert match is not None, name
        prefix, part = f"model.layers.{match[1]}", match[2]
        heads = _rotary_heads(part, config)
        for theirs, parts in self.fused.items():
            if part in parts:
                return Source((f"{prefix}.{theirs}",), partial(self._cut, part=part, parts=parts, config=config))
        matrix = part.removeprefix("feed_forward.")
        if matrix in self.experts:
            names = tuple(f"{prefix}.{self.experts[matrix].format(expert=n)}" for n in range(config.experts))
            if matrix == "w2":
                return Source(names, lambda *experts: torch.cat([expert.T for expert in experts]))
            return Source(names, lambda *experts: torch.cat(experts))
        names = (f"{prefix}.{self.layer.get(part, part)}",)
        return Source(names, partial(interleave, heads=heads, rotary_dim=config.rotary_dim)) if heads else Source(names)

    def _cut(self, whole: Tensor, part: str, parts: tuple[str, ...], config: DecoderConfig) -> Tensor:
        rows = self.split(whole, [_rows(each, config) for each in parts], config)[parts.index(part)]
        heads = _rotary_heads(part, config)
        return interleave(rows, heads, config.rotary_dim) if heads else rows

    def fuse(self, parts: Sequence[Tensor], config: DecoderConfig) -> Tensor:
        """One tensor of several, rotary channels as halves: their rows one after the other."""
        return torch.cat(list(parts))

    def split(self, whole: Tensor, rows: Sequence[int], config: DecoderConfig) -> Sequence[Tensor]:
        """The inverse of `fuse`. Part i gets `rows[i]` rows."""
        return torch.split(whole, list(rows))

    def our_name(self, theirs: str) -> str:
        """The canonical name of a tensor that one of ours is made of alone; else theirs."""
        ours = {value: key for key, value in {**self.top, **self.layer}.items()}
        if theirs in self.top.values():
            return f"decoder.{ours[theirs]}"
        match = _THEIR_LAYER.fullmatch(theirs)
        return f"decoder.layers.{match[1]}.{ours.get(match[2], match[2])}" if match else theirs

    def entries(self, reader: TensorReader, config: DecoderConfig, dtype: torch.dtype | None) -> dict[str, Entry]:
        """The decoder's tensors under the family's names, and how each is made of canonical ones.

        Args:
            dtype: of all tensors; None: each one's own.
        """
        wholes: dict[str, list[str]] = {}
        for name in reader:
            if name.startswith("decoder."):
                for theirs in self.source(name.removeprefix("decoder."), config).names:
                    wholes.setdefault(theirs, []).append(name)
        return dict(self._entries(reader, wholes, config, dtype))

    def _entries(
        self, reader: TensorReader, wholes: Mapping[str, list[str]], config: DecoderConfig, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Entry]]:
        for theirs, names in wholes.items():
            infos = [reader.info(name) for name in names]
            kind, shape = dtype or infos[0].dtype, infos[0].shape
            part = names[0].partition(".layers.")[2].partition(".")[2]
            if len(names) > 1:
                whole = TensorInfo((sum(info.shape[0] for info in infos), *shape[1:]), kind)
                yield theirs, Entry(whole, None, partial(self._fused, reader, tuple(names), config))
            elif (matrix := part.removeprefix("feed_forward.")) in self.experts:
                place = self.source(names[0].removeprefix("decoder."), config).names.index(theirs)
                rows, turned = shape[0] // config.experts, matrix == "w2"
                own = TensorInfo((shape[1], rows) if turned else (rows, shape[1]), kind)
                yield theirs, Entry(own, names[0], partial(_expert, place=place, rows=rows, turned=turned), shape)
            else:
                heads = _rotary_heads(part, config)
                make = partial(half_split, heads=heads, rotary_dim=config.rotary_dim) if heads else None
                yield theirs, Entry(TensorInfo(shape, kind), names[0], make, shape)

    def _fused(self, reader: TensorReader, names: tuple[str, ...], config: DecoderConfig) -> Tensor:
        parts = []
        for name in names:
            heads = _rotary_heads(name.partition(".layers.")[2].partition(".")[2], config)
            rows = reader.tensor(name)
            parts.append(half_split(rows, heads, config.rotary_dim) if heads else rows)
        return self.fuse(parts, config)


_THEIR_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")
"""A layer's tensor; also of a model that holds the decoder as a part."""


def _rotary_heads(part: str, config: DecoderConfig) -> int:
    """Heads in the first dimension of a layer's tensor if that has rotary channels; else 0.

    A norm of queries or keys has the channels of one head, or of all.
    """
    kind = part.removeprefix("attention.").rpartition(".")[0]
    width = config.qk_norm_over == "width"
    heads = {"wq": config.heads, "wk": config.kv_heads}
    return {**heads, "q_norm": heads["wq"] if width else 1, "k_norm": heads["wk"] if width else 1}.get(kind, 0)


def _rows(part: str, config: DecoderConfig) -> int:
    """Rows of a layer's matrix that may be fused with others."""
    kind = part.rpartition(".")[0].rpartition(".")[2]
    heads = {"wq": config.heads, "wk": config.kv_heads, "wv": config.kv_heads}
    return heads[kind] * config.head_dim if kind in heads else config.ffn_width


def _expert(matrix: Tensor, place: int, rows: int, turned: bool) -> Tensor:
    """One expert's [rows, D] of the matrix [experts * rows, D] of all; `turned`: [D, rows]."""
    own = matrix[place * rows : (place + 1) * rows]
    return own.T.contiguous() if turned else own


def _rope_section(scaling: RopeScaling) -> dict[str, Any]:
    """The section `rope_scaling` of a config.json."""
    section: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        section["original_max_position_embeddings"] = scaling.original_positions
    keys = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor"),
        "longrope": ("short_factor", "long_factor", "attention_factor"),
    }.get(scaling.kind, ())
    return section | {key: value for key in keys if (value := getattr(scaling, key)) is not None}


def layers_with_window(keys: Keys, first: int = 0) -> dict[str, Any]:
    """The options of a sliding window that only some layers have.

    Args:
        first: the first of these layers where the file does not list the layers' types.

    Raises:
        UserError: a layer is of a type that the decoder does not compute.
    """
    size, types = keys("sliding_window", 0), keys("layer_types")
    if not keys("use_sliding_window", False) or not size:
        keys.without_effect("layer_types", "max_window_layers")
        if types and set(types) != {"full_attention"}:
            raise keys.refuse("layer_types")
        return {}
    layers = keys["num_hidden_layers"]
    if types is None:
        chosen = list(range(first, layers))
    elif set(types) <= {"full_attention", "sliding_attention"} and len(types) == layers:
        chosen = [layer for layer, kind in enumerate(types) if kind == "sliding_attention"]
    else:
        raise keys.refuse("layer_types")
    return window_options(size, chosen, layers)


def window_options(size: int, chosen: Sequence[int], layers: int) -> dict[str, Any]:
    """The options of a window in the layers `chosen`; one way to say each of them."""
    if not chosen or not size:
        return {}
    return {"window": size, "window_layers": None if len(chosen) == layers else list(chosen)}


def window_keys(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `layers_with_window`."""
    sliding = [config.has_window(layer) for layer in range(config.layers)]
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": config.window or None,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in sliding],
    }


FAMILIES: Registry[Family] = Registry("family of language models")


def family_of(config: DecoderConfig) -> Family:
    """The first family of transformers that computes what this decoder does.

    Raises:
        ValueError: there is none.
    """
    lacking = {name: family.lacks(config) for name, family in FAMILIES.items() if family.architecture}
    nearest = min(lacking, key=lambda name: (len(lacking[name]), list(lacking).index(name)))
    if lacking[nearest]:
        raise ValueError(
            f"a decoder that no class of transformers computes (the nearest, {FAMILIES[nearest].architecture}, has no "
            f"{', '.join(lacking[nearest])})"
        )
    return FAMILIES[nearest]
