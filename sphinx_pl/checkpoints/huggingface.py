"""Folders that `from_pretrained` reads, if their weights are safetensors.

A decoder of a known family is a checkpoint of a text-only model, so it can be shown, imported and
named by `model.decoder.load`. Any other model can be mixed with its like, under the files' own
names.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_pl.checkpoints.families import FAMILIES, Family, family_of
from sphinx_pl.checkpoints.folder import (
    CONFIG,
    INDEX,
    read_json,
    read_provenance,
    read_weight_map,
    sizes_of,
    write_json,
)
from sphinx_pl.checkpoints.format import FORMATS, Checkpoint, SafetensorsFolder, open_checkpoint, text_only
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
from sphinx_pl.checkpoints.output import OutputFolder, safetensors_folder, write_index
from sphinx_pl.checkpoints.tensors import SafetensorsFiles, TensorInfo, TensorReader, same_bits
from sphinx_pl.checkpoints.tokenizer_json import TOKENIZER_CONFIG, TOKENIZER_JSON, tokenizer_json
from sphinx_pl.checkpoints.unreadable import check_plain, check_unquantized
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


def read_family(values: Mapping[str, Any], file: Path) -> Family:
    """The family that a config.json names by its model_type.

    Raises:
        UserError: this project does not have it.
    """
    if (kind := str(values["model_type"])) not in FAMILIES:
        raise UserError(f"'{file}': model_type '{kind}' cannot be read: {suggest(kind, FAMILIES)}")
    return FAMILIES[kind]


def read_decoder(family: Family, values: Mapping[str, Any], file: Path) -> DecoderConfig:
    """The decoder that the values of a config.json describe.

    Raises:
        UserError: it is none that is computed here, or a value is missing or wrong.
    """
    with sizes_of(file):
        try:
            return family.decoder(values)
        except UserError as error:
            raise UserError(f"'{file}': {error}") from None


class FamilyCheckpoint(Checkpoint):
    """A decoder whose tensors have the names of a family in `sphinx_pl.checkpoints.families`."""

    def _open(self, family: Family, decoder: DecoderConfig, tensors: TensorReader) -> None:
        """Look up where each tensor of `decoder` stands in `tensors`."""
        self.config = text_only(self.path.stem if self.path.is_file() else self.path.name, decoder)
        self._top, self._tensors = family.top, tensors
        stored = set(tensors)
        with torch.device("meta"):
            wanted = list(Decoder(decoder).state_dict())
        sources = {name: family.source(name, decoder) for name in wanted}
        used = {theirs for source in sources.values() for theirs in source.names}
        # Saved from the class without an output head (LlamaModel), names lack their beginning.
        bare = not used & stored and any(f"model.{name}" in used for name in stored)
        self._prefix = "model." if bare else ""
        self._stored = {f"{self._prefix}{name}": name for name in tensors}
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
        if theirs != self._top["output.weight"] or not self.model_config.decoder.tie_embeddings:
            return False
        embedding = self._top["tok_embeddings.weight"]
        return embedding in self._stored and same_bits(self._their_tensor(theirs), self._their_tensor(embedding))

    def _their_tensor(self, theirs: str) -> Tensor:
        return self._tensors.tensor(self._stored[theirs])

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
        infos = [self._tensors.info(self._stored[theirs]) for theirs in source.names]
        return TensorInfo(source.shape([info.shape for info in infos]), infos[0].dtype)

    def tensor(self, name: str) -> Tensor:
        source = self._source(name)
        return source.make(*(self._their_tensor(theirs) for theirs in source.names))

    def _source(self, name: str) -> Source:
        return self._sources.get(name, Source((name,)))


class HuggingFaceCheckpoint(FamilyCheckpoint):
    """A decoder that `from_pretrained` reads."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        return is_huggingface(path)

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path / CONFIG)
        check_unquantized(path, values, (), "read")  # before a family refuses the keys of a quantized model
        family = read_family(values, path / CONFIG)
        decoder = read_decoder(family, values, path / CONFIG)
        self.provenance = {"original": family.name} | read_provenance(path)
        self._shards = SafetensorsFiles(path, weight_files(path))
        check_plain(path, values, list(self._shards), "read")
        self._open(family, decoder, self._shards)

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
        kind = str(self.config["model_type"])
        self._family = FAMILIES[kind if kind in FAMILIES else "llama"]
        self.provenance = {"original": kind}
        self.provenance |= read_provenance(path)

    def canonical_name(self, name: str) -> str:
        return self._family.our_name(name)

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


def exported_family(checkpoint: Checkpoint, name: str | None = None) -> Family:
    """The family that a checkpoint's decoder is exported as.

    Args:
        name: the family's; None: the first one of transformers that computes this decoder.

    Raises:
        UserError: there is none, or the one of that name does not compute it.
    """
    config = checkpoint.model_config.decoder
    if name is not None:
        family = FAMILIES[name]
        if not family.architecture or (lacking := family.lacks(config)):
            why = f"has no {', '.join(lacking)}" if family.architecture else "is not in transformers"
            raise UserError(f"'{checkpoint.path}' is not exported as {name}, which {why}")
        return family
    try:
        return family_of(config)
    except ValueError as error:
        raise UserError(f"'{checkpoint.path}' has {error}, which is not exported to Hugging Face's layout") from None


def huggingface_folder(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, family: str | None = None
) -> OutputFolder:
    """A folder that the family's class loads with `from_pretrained`: the decoder, made of tensors
    with canonical names.

    Args:
        dtype: of all tensors; None: each one's own.
        family: see `exported_family`.

    Raises:
        UserError: see `exported_family`; or there is no tokenizer, or none that transformers
            applies alike.
    """
    config, chosen = checkpoint.model_config.decoder, exported_family(checkpoint, family)
    entries = chosen.entries(checkpoint, config, dtype)
    file = checkpoint.tokenizer()
    tokenizer = load_tokenizer(file)
    exported = None if file.suffix == ".json" else tokenizer_json(file)
    values = chosen.config(config) | {
        "torch_dtype": str(dtype or checkpoint.info("decoder.norm.weight").dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }

    def finish(folder: Path) -> None:
        write_json(folder / CONFIG, values)
        tokenizer.write(folder)
        if exported is not None:
            text, settings = exported
            write_whole(folder / TOKENIZER_JSON, text)
            write_json(folder / TOKENIZER_CONFIG, settings)

    return safetensors_folder(entries, finish)


def write_huggingface(checkpoint: Checkpoint, out: Path, family: str | None = None) -> None:
    """Write the decoder of `checkpoint` as a Hugging Face folder.

    Raises:
        UserError: `out` exists, or see `huggingface_folder`.
    """
    reader = copy(checkpoint)
    # The experts of one matrix are written one after the other.
    reader.tensor = lru_cache(1)(checkpoint.tensor)  # type: ignore[method-assign]
    CheckpointWriter(out, huggingface_folder(checkpoint, family=family), progress="Exporting").write(reader)
