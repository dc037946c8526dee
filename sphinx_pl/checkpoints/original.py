"""The layout of the released SPHINX weights, which LLaMA2-Accessory wrote.

consolidated.00-of-02.model.pth ...   {"model": {"llma.…": tensor}}, see `torch_shards.py`;
                                      .model-diff.pth: differences to a base model, see `Restored`
config.json                           the decoder's sizes
meta.json                             {"llama_type": "llama_ens"}, the model's class
tokenizer.model
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sphinx_pl.checkpoints.folder import CONFIG, TOKENIZER, read_json, read_provenance, sizes_of, write_json
from sphinx_pl.checkpoints.format import FORMATS, Checkpoint, ModelFolder, differences
from sphinx_pl.checkpoints.output import Entry, OutputFolder, TorchOutput
from sphinx_pl.checkpoints.tensors import ENCODER_PREFIX, TensorInfo
from sphinx_pl.checkpoints.torch_shards import META, ShardsFolder, TorchShards, split
from sphinx_pl.checkpoints.writer import CheckpointWriter
from sphinx_pl.data.processor import TEXT_LENGTH, ProcessorConfig
from sphinx_pl.models.config import DecoderConfig, RopeScaling, SphinxConfig
from sphinx_pl.models.encoders.base import ENCODERS
from sphinx_pl.utils.config import CONFIG_FOLDER
from sphinx_pl.utils.errors import UserError, suggest

log = logging.getLogger(__name__)

_SHARD = re.compile(r"consolidated\.(\d+)-of-(\d+)\.(model|model-diff)\.pth")

# The class names of the original, and the configuration in conf/model that has their encoders and
# views.
TYPES: dict[str, str] = {
    "llama_ens": "sphinx_7b",
    "llama_ens5": "sphinx_1k_13b",
    "llama_ens10": "sphinx_2k_13b",
    "llama_ens5p2": "sphinx_pooled_13b",
    "llama_ens_light": "sphinx_tiny",
    "llama_ens5_light": "sphinx_tiny_1k",
    "mixtral_sparse_ens": "sphinx_moe",
    "mixtral_sparse_ens5": "sphinx_moe_1k",
}

_ENCODERS = {kind: encoder.original for kind, encoder in ENCODERS.items() if encoder.original is not None}
# The original's prefix, ours, and what is renamed behind it.
_PREFIXES: tuple[tuple[tuple[str, str], tuple[tuple[str, str], ...]], ...] = (
    *(((names.theirs, f"{ENCODER_PREFIX}{kind}.{names.ours}"), names.renamed) for kind, names in _ENCODERS.items()),
    *(((f"llma.{kind}_proj.", f"mixer.{kind}_proj."), ()) for kind in _ENCODERS if ENCODERS[kind].join == "sequence"),
    (("llma.visual_proj.", "mixer.visual_proj."), ()),
    (("llma.start_img", "mixer.start_img"), ()),
    (("llma.end_img", "mixer.end_img"), ()),
    (("llma.", "decoder."), ()),
)
# Parameters that no forward pass uses but the original's files have.
UNUSED: dict[str, tuple[int, ...]] = {
    name: shape for names in _ENCODERS.values() for name, shape in names.unused.items()
}
_FLAT = ("mixer.start_img", "mixer.end_img")  # [1, 1, D] there, [D] here


def our_name(name: str) -> str:
    """The original's name of a tensor -> the one that `Sphinx` gives it."""
    return _renamed(name, 0, 1)


def their_name(name: str) -> str:
    """The inverse of `our_name`."""
    return _renamed(name, 1, 0)


def _renamed(name: str, old: int, new: int) -> str:
    prefix, parts = next((prefix, parts) for prefix, parts in _PREFIXES if name.startswith(prefix[old]))
    name = prefix[new] + name[len(prefix[old]) :]
    for part in parts:
        name = name.replace(part[old], part[new])
    return name


def ffn_width(width: int, multiple_of: int, multiplier: float | None) -> int:
    """LLaMA's rule: 8/3 of the width, times the multiplier, rounded up to a multiple."""
    hidden = int(8 * width / 3)
    hidden = int(multiplier * hidden) if multiplier else hidden
    return -(-hidden // multiple_of) * multiple_of


def shipped_model(name: str) -> dict[str, Any]:
    """conf/model/<name>.yaml with the files that it builds on."""
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONFIG_FOLDER / "model" / f"{name}.yaml"))  # type: ignore[assignment]
    bases = [base for base in values.pop("defaults", []) if base != "_self_"]
    merged = OmegaConf.merge(*(shipped_model(base) for base in bases), values)
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


# What the original's classes take for what config.json leaves out.
_LLAMA: dict[str, Any] = {
    "n_kv_heads": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "rope_theta": 10000,
}
_MIXTRAL: dict[str, Any] = {
    "n_kv_heads": None,
    "norm_eps": 1e-5,
    "rope_theta": 1000000,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2},
    "load_balancing_weight": 0.1,
}
_DEFAULTS = {"mixtral_sparse_ens": _MIXTRAL, "mixtral_sparse_ens5": _MIXTRAL | {"load_balancing_weight": 0.01}}


def decoder_config(sizes: dict[str, Any], vocab_size: int, kind: str = "") -> DecoderConfig:
    """From the original's config.json, which is Meta's params.json with more keys.

    Args:
        kind: the original's class, of which `sizes` may leave out defaults.

    Raises:
        UserError: it asks for something that the decoder here does not compute.
        KeyError: a size is missing.
    """
    sizes = _DEFAULTS.get(kind, _LLAMA) | {key: value for key, value in sizes.items() if value is not None}
    width, heads, moe = sizes["dim"], sizes["n_heads"], sizes.get("moe")
    scaled = sizes.get("use_scaled_rope", False)
    if sizes.get("rope_scaling", 1) != 1:
        raise UserError(f"config.json: rope_scaling={sizes['rope_scaling']} is not what the decoder here computes")
    if moe:
        ffn = sizes["hidden_dim"]
    else:
        ffn = ffn_width(width, sizes["multiple_of"], sizes.get("ffn_dim_multiplier"))
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        layers=sizes["n_layers"],
        heads=heads,
        kv_heads=sizes["n_kv_heads"] or heads,
        ffn_width=ffn,
        norm_eps=sizes["norm_eps"],
        rope_theta=float(sizes["rope_theta"]),
        max_positions=sizes.get("max_seq_len", 4096),
        experts=moe["num_experts"] if moe else 0,
        experts_per_token=moe["num_experts_per_tok"] if moe else 2,
        balance_weight=sizes["load_balancing_weight"] if moe else 0.0,
        # LLaMA 3.1's, whose numbers are in Meta's code.
        rope_scaling=RopeScaling("llama3", sizes.get("rope_scaling_factor", 8.0), 8192) if scaled else None,
    )


class OriginalCheckpoint(Checkpoint):
    """A folder in the original's layout, of any number of shards."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path / META).is_file() and "llama_type" in read_json(path / META)

    def __init__(self, path: Path) -> None:
        self.path = path
        kind = read_json(path / META)["llama_type"]
        if kind not in TYPES:
            raise UserError(f"'{path / META}': llama_type '{kind}' cannot be read: {suggest(str(kind), TYPES)}")
        if not self.tokenizer_file.is_file():
            raise UserError(f"'{self.tokenizer_file}' is missing: copy the original's tokenizer.model there")
        sizes = read_json(path / CONFIG)
        files = self._shard_files()
        self.is_delta = "model-diff" in files[0].name
        with sizes_of(path / CONFIG):
            moe: Any = sizes.get("moe") or _DEFAULTS.get(kind, {}).get("moe")
            experts = moe["num_experts"] if moe else 0
        self.shards = TorchShards(files, lambda content: content["model"], experts)
        if foreign := [name for name in self.shards if not name.startswith("llma.")]:
            raise UserError(f"'{path}' has '{foreign[0]}', without the prefix 'llma.': it is not SPHINX's")
        self._theirs = {our_name(name): name for name in self.shards if name not in UNUSED}
        vocab = self.shards.info("llma.tok_embeddings.weight").shape[0]
        with sizes_of(path / CONFIG):
            decoder = decoder_config(sizes, vocab, kind)
        model = shipped_model(TYPES[kind]) | {"name": kind, "decoder": vars(decoder)}
        # What the original's own inference computes with these weights; see docs/original.md.
        notes = []
        for encoder, names in _ENCODERS.items():
            if model["vision"]["encoders"].get(encoder):
                model["vision"]["encoders"][encoder] |= names.config
                notes += [names.note] if names.note else []
        config = SphinxConfig.from_dict(model)
        # The usual length of a text behind one image, as far as the decoder's positions reach.
        length = min(decoder.max_positions, config.tokens_per_image + TEXT_LENGTH)
        self.config = {"model": config.to_dict(), "processor": asdict(ProcessorConfig(max_length=length))}
        self.provenance = {"original": kind} | read_provenance(path)
        if notes:
            self.provenance["note"] = "; ".join(notes)

    def _shard_files(self) -> list[Path]:
        present = {file: match for file in self.path.iterdir() if (match := _SHARD.fullmatch(file.name))}
        sets = {(int(match[2]), match[3]) for match in present.values()}
        if len(sets) != 1:
            raise UserError(
                f"'{self.path}' holds shards of {len(sets)} checkpoints: expected consolidated.00-of-NN.model.pth to "
                "the last of the same NN"
            )
        ((total, suffix),) = sets
        files = [self.path / _shard_name(rank, total, suffix) for rank in range(total)]
        for file in files:
            if file not in present:
                raise UserError(f"'{file}' is missing: copy all {total} shards")
        return files

    def load_into(self, module: nn.Module, part: str = "") -> None:
        super().load_into(module, part)
        if note := self.provenance.get("note"):
            log.warning("%s: %s", self.path, note)

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def info(self, name: str) -> TensorInfo:
        info = self.shards.info(self._theirs[name])
        return TensorInfo(info.shape[-1:], info.dtype) if name in _FLAT else info

    def tensor(self, name: str) -> Tensor:
        tensor = self.shards.tensor(self._theirs[name])
        return tensor.flatten() if name in _FLAT else tensor

    def unused(self) -> Iterable[tuple[str, Tensor]]:
        return ((name, self.shards.tensor(name)) for name in self.shards if name in UNUSED)

    def files(self) -> Sequence[Path]:
        return [self.path / CONFIG, self.path / META, self.tokenizer_file, *self.shards.files]

    def raw(self) -> ModelFolder:
        return ShardsFolder(self, self.shards, "original", "model", our_name)


FORMATS.register("original", OriginalCheckpoint)


def _shard_name(rank: int, total: int, suffix: str = "model") -> str:
    return f"consolidated.{rank:02d}-of-{total:02d}.{suffix}.pth"


class Restored(Checkpoint):
    """Differences with their base added; what the base lacks is as it stands.

    Args:
        base: a decoder alone, Meta's LLaMA-2 for instance.

    Raises:
        UserError: `delta` holds no differences, or the base's tensors have other shapes.
    """

    @classmethod
    def matches(cls, path: Path) -> bool:
        return False  # it takes two

    def __init__(self, delta: Checkpoint, base: Checkpoint) -> None:
        if not (isinstance(delta, OriginalCheckpoint) and delta.is_delta):
            raise UserError(f"'{delta.path}' holds whole weights, not differences (.model-diff.pth): leave out --base")
        self.path = delta.path
        self.config, self.provenance = delta.config, delta.provenance
        self._delta, self._base = delta, base
        self._changed, self._known = set(delta), set(base)
        for name in base:
            if name in self._changed and base.info(name).shape != delta.info(name).shape:
                sizes = f"{list(base.info(name).shape)} there, {list(delta.info(name).shape)} here"
                raise UserError(f"'{base.path}' is not the base of '{delta.path}': '{name}' is {sizes}")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._delta, *self._base]))

    def info(self, name: str) -> TensorInfo:
        return (self._delta if name in self._changed else self._base).info(name)

    def tensor(self, name: str) -> Tensor:
        """The float32 sum in the difference's dtype; the original adds in the model's."""
        if name not in self._changed:
            return self._base.tensor(name)
        delta = self._delta.tensor(name)
        if name not in self._known:
            return delta
        base, out = self._base.tensor(name), torch.empty_like(delta)
        rows = max(1, 2**22 // max(1, delta[:1].numel()))  # in pieces: float32 takes twice the memory
        for d, b, o in zip(*(torch.split(tensor, rows) for tensor in (delta, base, out)), strict=True):
            o.copy_(d.float() + b.float())
        return out

    def unused(self) -> Iterable[tuple[str, Tensor]]:
        return self._delta.unused()

    def files(self) -> Sequence[Path]:
        return [*self._delta.files(), *self._base.files()]

    @property
    def tokenizer_file(self) -> Path:
        return self._delta.tokenizer_file


_SIZES = (
    *("vocab_size", "width", "layers", "heads", "kv_heads", "ffn_width", "norm_eps", "rope_theta", "max_positions"),
    *("experts", "experts_per_token", "balance_weight", "load"),
)
"""Keys of `DecoderConfig` that the original's config.json holds, and what no weight depends on."""

# -- the way back ----------------------------------------------------------------------------------


def original_type(checkpoint: Checkpoint) -> str:
    """The name of the original's class that computes what this checkpoint's model does.

    Raises:
        UserError: there is none.
    """
    model = checkpoint.model_config
    plain = DecoderConfig(**{key: getattr(model.decoder, key) for key in _SIZES})
    if options := [key for key, value in vars(model.decoder).items() if value != getattr(plain, key)]:
        raise UserError(f"'{checkpoint.path}': the original's decoder has no {', '.join(options)}")
    if model.image_position != "after_bos":
        raise UserError(f"'{checkpoint.path}': the original puts images after BOS, this model {model.image_position}")
    for kind, name in TYPES.items():
        shipped = SphinxConfig.from_dict(shipped_model(name))
        same_view = not differences({"v": model.to_dict()["vision"]}, {"v": _as_configured(shipped, model)}, "")
        if same_view and bool(shipped.decoder.experts) == bool(model.decoder.experts):
            return kind
    raise UserError(
        f"'{checkpoint.path}': none of the original's types has these encoders and views: {', '.join(TYPES)}"
    )


def _as_configured(shipped: SphinxConfig, model: SphinxConfig) -> Any:
    """The shipped vision part with those values of the model's that the original's files do not hold."""
    vision = shipped.to_dict()["vision"]
    for kind, section in (model.vision.encoders if model.vision else {}).items():
        if kind in vision["encoders"]:
            vision["encoders"][kind] |= {key: getattr(section, key) for key in section.free}
    return vision


def decoder_sizes(decoder: DecoderConfig) -> dict[str, Any]:
    """The original's config.json, the inverse of `decoder_config`."""
    sizes: dict[str, Any] = {
        "dim": decoder.width,
        "n_layers": decoder.layers,
        "n_heads": decoder.heads,
        "n_kv_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab_size,
        "norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "max_seq_len": decoder.max_positions,
    }
    if decoder.experts:
        moe = {"num_experts": decoder.experts, "num_experts_per_tok": decoder.experts_per_token}
        more = {"hidden_dim": decoder.ffn_width, "head_dim": decoder.head_dim, "moe": moe}
        return sizes | more | {"load_balancing_weight": decoder.balance_weight}
    if ffn_width(decoder.width, 256, None) == decoder.ffn_width:
        return sizes | {"multiple_of": 256, "ffn_dim_multiplier": None}
    # Any other width: it is the first multiple of itself above what the rule gives.
    plain = int(8 * decoder.width / 3)
    multiplier = None if plain <= decoder.ffn_width else decoder.ffn_width / plain
    return sizes | {"multiple_of": decoder.ffn_width, "ffn_dim_multiplier": multiplier}


def their_infos(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors that the original's file of this checkpoint has, by the original's names."""
    vision = checkpoint.model_config.vision
    infos = {their_name(name): checkpoint.info(name) for name in checkpoint}
    some = next(iter(infos.values())).dtype
    for name in map(their_name, _FLAT):
        infos[name] = TensorInfo((1, 1, *infos[name].shape), infos[name].dtype)
    kept = {name: tensor.dtype for name, tensor in checkpoint.unused()}
    for kind in vision.encoders if vision else ():
        for name, shape in _ENCODERS[kind].unused.items():
            infos[name] = TensorInfo(shape, kept.get(name, some))
    return infos


def original_folder(checkpoint: Checkpoint, shards: int = 1, dtype: torch.dtype | None = None) -> OutputFolder:
    """The original's folder of `shards` files, made of tensors with canonical names.

    Parameters that the original has but no forward pass uses are those the checkpoint was imported
    with, else zeros.

    Args:
        dtype: of all tensors; None: each one's own.

    Raises:
        UserError: the original has no such model, a tensor cannot be split so often, or there is no
            tokenizer.
    """
    kind = original_type(checkpoint)
    experts, kv_heads = checkpoint.model_config.decoder.experts, checkpoint.model_config.decoder.kv_heads
    if kv_heads % shards:  # the original gives every rank whole heads
        raise UserError(f"'{checkpoint.path}' has {kv_heads} key/value heads, not a multiple of {shards} shards")
    unused, tokenizer = dict(checkpoint.unused()), checkpoint.tokenizer()
    if tokenizer.name != TOKENIZER:
        raise UserError(f"'{tokenizer}' is no {TOKENIZER}, which is all that the original reads: export to huggingface")
    names = {their_name(name): name for name in checkpoint}
    parts: list[dict[str, Entry]] = [{} for _ in range(shards)]
    for name, info in their_infos(checkpoint).items():
        for rank, part in enumerate(split(name, torch.empty(info.shape, device="meta"), shards, experts)):
            here = TensorInfo(tuple(part.shape), dtype or info.dtype)
            if name not in names:
                value = unused.get(name)
                zeros = partial(torch.zeros, info.shape, dtype=info.dtype)
                parts[rank][name] = Entry(here, None, zeros if value is None else partial(torch.clone, value))
            elif shards == 1:
                parts[rank][name] = Entry(here, names[name])
            else:
                cut = partial(_part, name, rank, shards, experts)
                parts[rank][name] = Entry(here, names[name], cut, info.shape)

    def finish(folder: Path) -> None:
        write_json(folder / CONFIG, decoder_sizes(checkpoint.model_config.decoder))
        write_json(folder / META, {"llama_type": kind})
        shutil.copyfile(tokenizer, folder / TOKENIZER)

    return OutputFolder([TorchOutput(_shard_name(rank, shards), p, "model") for rank, p in enumerate(parts)], finish)


def _part(name: str, rank: int, shards: int, experts: int, whole: Tensor) -> Tensor:
    return split(name, whole, shards, experts)[rank]


def write_original(checkpoint: Checkpoint, out: Path, shards: int = 1) -> str:
    """Write `checkpoint` as the original's folder of `shards` files, a tensor at a time; returns
    its type.

    Raises:
        UserError: `out` exists, or see `original_folder`.
    """
    CheckpointWriter(out, original_folder(checkpoint, shards), progress="Exporting").write(checkpoint)
    return original_type(checkpoint)
