"""Folders that `from_pretrained` reads, if their weights are safetensors.

A decoder of a known family is a checkpoint of a text-only model, so it can be shown, imported and
named by `model.decoder.load`. Any other model can be mixed with its like, under the files' own
names.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_pl.checkpoints.folder import (
    CONFIG,
    INDEX,
    read_json,
    read_provenance,
    read_weight_map,
    sizes_of,
    write_json,
)
from sphinx_pl.checkpoints.format import FORMATS, Checkpoint, SafetensorsFolder, open_checkpoint
from sphinx_pl.checkpoints.hub import local_folder
from sphinx_pl.checkpoints.huggingface_files import (
    WEIGHTS,
    belongs,
    config_difference,
    is_huggingface,
    other_files,
    tokenizer_difference,
    weight_files,
)
from sphinx_pl.checkpoints.llama import (
    LLAMA_TOP,
    family,
    internlm2_source,
    llama_entries,
    llama_source,
    our_llama_name,
    text_only,
)
from sphinx_pl.checkpoints.output import OutputFolder, safetensors_folder, write_index
from sphinx_pl.checkpoints.tensors import SafetensorsFiles, TensorInfo, same_bits
from sphinx_pl.checkpoints.tokenizer_json import TOKENIZER_CONFIG, TOKENIZER_JSON, tokenizer_json
from sphinx_pl.checkpoints.unreadable import check_plain
from sphinx_pl.checkpoints.vocabulary import uncompared, vocabulary_difference
from sphinx_pl.checkpoints.writer import CheckpointWriter
from sphinx_pl.data.prompt_formats import ChatTemplate
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.models.config import DecoderConfig
from sphinx_pl.models.decoder import Decoder
from sphinx_pl.models.published import Source
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import write_whole

log = logging.getLogger(__name__)

_FAMILIES: dict[str, Callable[[str, DecoderConfig], Source]] = {
    "llama": llama_source,
    "qwen3": llama_source,
    "mixtral": llama_source,
    "internlm2": internlm2_source,
}


def _from_huggingface(values: dict[str, Any], file: Path) -> DecoderConfig:
    """The decoder that a config.json of transformers describes.

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
    """A decoder that `from_pretrained` reads: LLaMA (TinyLlama too), Mixtral, InternLM2."""

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
        self.config = text_only(path.name, decoder)
        self.provenance = {"original": kind} | read_provenance(path)
        self._shards = SafetensorsFiles(path, weight_files(path))
        stored = set(self._shards)
        check_plain(path, values, stored, "read")
        with torch.device("meta"):
            wanted = list(Decoder(decoder).state_dict())
        sources = {name: _FAMILIES[kind](name, decoder) for name in wanted}
        used = {theirs for source in sources.values() for theirs in source.names}
        # Saved from the class without an output head (LlamaModel), names lack their beginning.
        bare = not used & stored and any(f"model.{name}" in used for name in stored)
        self._prefix = "model." if bare else ""
        self._stored = {f"{self._prefix}{name}": name for name in self._shards}
        self._sources = {f"decoder.{name}": source for name, source in sources.items()}
        self._extra = [name for name in self._stored if name not in used and not self._is_repeated(name)]

    @cached_property
    def processor(self) -> dict[str, Any]:
        """The model's own chat template, if it has one that can be used; else the default format."""
        try:
            ChatTemplate(load_tokenizer(self.tokenizer()))
        except UserError:
            return {}
        return {"prompt_format": ChatTemplate.name}

    def _is_repeated(self, theirs: str) -> bool:
        """Whether a tensor says nothing new: computed angles, or a head that is the embedding."""
        if theirs.endswith("rotary_emb.inv_freq"):
            return True
        if theirs != LLAMA_TOP["output.weight"] or not self.model_config.decoder.tie_embeddings:
            return False
        embedding = LLAMA_TOP["tok_embeddings.weight"]
        return embedding in self._stored and same_bits(self._their_tensor(theirs), self._their_tensor(embedding))

    def _their_tensor(self, theirs: str) -> Tensor:
        return self._shards.tensor(self._stored[theirs])

    def check(self, module: nn.Module, part: str = "") -> None:
        if self._prefix and "decoder.output.weight" in self._sources:
            raise UserError(
                f"'{self.path}' has no output head (lm_head.weight): it was saved from LlamaModel or its like, save it "
                "from LlamaForCausalLM"
            )
        super().check(module, part)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name, source in self._sources.items() if self._stored.keys() >= set(source.names))
        yield from self._extra

    def info(self, name: str) -> TensorInfo:
        source = self._source(name)
        infos = [self._shards.info(self._stored[theirs]) for theirs in source.names]
        return TensorInfo(source.shape([info.shape for info in infos]), infos[0].dtype)

    def tensor(self, name: str) -> Tensor:
        source = self._source(name)
        return source.make(*(self._their_tensor(theirs) for theirs in source.names))

    def _source(self, name: str) -> Source:
        return self._sources.get(name, Source((name,)))

    def files(self) -> Sequence[Path]:
        return [self.path / CONFIG, *(file.path for file in self._shards.files.values())]


FORMATS.register("huggingface", HuggingFaceCheckpoint)


class HuggingFaceFolder(SafetensorsFolder):
    """A folder with any model, under the names of its files. A copy has the same files."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = SafetensorsFiles(path, weight_files(path))
        if WEIGHTS not in self.tensors.files:
            places = {name: self.file(name).name for name in self}
            for name, file in read_weight_map(path / INDEX).items():
                if places.get(name) != file:
                    raise UserError(f"'{path / INDEX}' has '{name}' in {file}, where it is not: copy the folder again")
        self.config = read_json(path / CONFIG)
        self.provenance = {"original": str(self.config["model_type"])}
        self.provenance |= read_provenance(path)

    def canonical_name(self, name: str) -> str:
        return our_llama_name(name)

    def canonical(self) -> Checkpoint:
        return open_checkpoint(self.path)

    def compare(self, other: HuggingFaceFolder) -> str:
        file, problem = CONFIG, config_difference(self.config, other.config)
        if not problem and (file := tokenizer_difference(self.path, other.path)):
            problem = f"their tokenizers differ in {file}"
        if not problem and (tokens := vocabulary_difference(self.path, other.path)):
            file, problem = "tokenizer", f"their tokenizers differ: {tokens}"
        return f"{problem} (if that changes nothing, have one {file} in both)" if problem else ""

    def check_numbers(self) -> None:
        check_plain(self.path, self.config, list(self), "mix")

    def note(self, other: HuggingFaceFolder) -> str:
        return "; ".join(filter(None, (uncompared(self.path, other.path), other_files(self.path, other.path))))

    def output(self, dtype: torch.dtype | None = None) -> OutputFolder:
        files = self.copies(dtype)

        def finish(folder: Path) -> None:
            for file in self.path.iterdir():
                if file.is_file() and belongs(file.name):
                    shutil.copyfile(file, folder / file.name)
            inside = sorted(file.name for file in self.path.iterdir() if file.is_dir() and belongs(file.name))
            if inside:
                log.warning("folders in '%s' are not mixed and not copied: %s", self.path, ", ".join(inside))
            dtypes = {entry.info.dtype for file in files for entry in file.entries.values()}
            dtypes = {dtype for dtype in dtypes if dtype.is_floating_point}
            if len(dtypes) == 1:
                config = read_json(folder / CONFIG)
                keys = [key for key in ("torch_dtype", "dtype") if key in config]
                write_json(folder / CONFIG, config | dict.fromkeys(keys, str(dtypes.pop()).removeprefix("torch.")))
            if [file.name for file in files] != [WEIGHTS]:
                write_index(folder, files)

        return OutputFolder(files, finish)


def open_model(path: str | Path) -> Checkpoint | HuggingFaceFolder:
    """As `open_checkpoint`, but a Hugging Face folder may hold any kind of model."""
    folder = local_folder(path)
    return HuggingFaceFolder(folder) if is_huggingface(folder) else open_checkpoint(folder)


# -- exporting -------------------------------------------------------------------------------------


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
        "torch_dtype": dtype,
    } | more


def huggingface_folder(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> OutputFolder:
    """A folder that `family(config).from_pretrained` loads: the decoder, made of tensors with
    canonical names.

    Args:
        dtype: of all tensors; None: each one's own.

    Raises:
        UserError: no class of transformers computes the decoder, or there is no tokenizer, or none
            that transformers applies alike.
    """
    config = checkpoint.model_config.decoder
    try:
        family(config)
    except ValueError as error:
        raise UserError(f"'{checkpoint.path}' has {error}, which is not exported to Hugging Face's layout") from None
    entries = llama_entries(checkpoint, config, dtype)
    file = checkpoint.tokenizer()
    tokenizer = load_tokenizer(file)
    exported = None if file.suffix == ".json" else tokenizer_json(file)
    name_of_dtype = str(dtype or checkpoint.info("decoder.norm.weight").dtype).removeprefix("torch.")

    def finish(folder: Path) -> None:
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        write_json(folder / CONFIG, huggingface_config(config, name_of_dtype) | ends)
        tokenizer.write(folder)
        if exported is not None:
            text, settings = exported
            write_whole(folder / TOKENIZER_JSON, text)
            write_json(folder / TOKENIZER_CONFIG, settings)

    return safetensors_folder(entries, finish)


def write_huggingface(checkpoint: Checkpoint, out: Path) -> None:
    """Write the decoder of `checkpoint` as a Hugging Face folder.

    Raises:
        UserError: `out` exists, or see `huggingface_folder`.
    """
    reader = copy(checkpoint)
    # The experts of one matrix are written one after the other.
    reader.tensor = lru_cache(1)(checkpoint.tensor)  # type: ignore[method-assign]
    CheckpointWriter(out, huggingface_folder(checkpoint), progress="Exporting").write(reader)
