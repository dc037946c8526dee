"""Our own folder of a model's weights.

    model-00001-of-00002.safetensors ...   the weights, each tensor once
    model.safetensors.index.json           tensor name -> shard, as Hugging Face writes it
    config.json                            {"format": 1, "model": SphinxConfig, "processor": ...}
                                           and "left_out": tensors read from `load` entries
    tokenizer.model                        SentencePiece's, or Hugging Face's tokenizer.json with the
                                           files beside it that belong to the tokenizer
    provenance.json                        see `sphinx_pl.checkpoints.provenance`
    unused.safetensors                     what no model here uses, kept for an export

A folder is written under a temporary name and renamed, so whatever has the final name is complete.
"""

from __future__ import annotations

import logging
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.checkpoints.encoders import pretrained_values
from sphinx_pl.checkpoints.folder import (
    CONFIG,
    INDEX,
    PROVENANCE,
    UNUSED,
    check_sections,
    read_json,
    read_weight_map,
    require,
    sizes_of,
    write_json,
)
from sphinx_pl.checkpoints.format import (
    FORMAT_VERSION,
    FORMATS,
    Checkpoint,
    ModelFolder,
    SafetensorsFolder,
    native_folder,
)
from sphinx_pl.checkpoints.output import MAX_SHARD_BYTES, OutputFolder, write_index
from sphinx_pl.checkpoints.tensors import (
    DTYPE_NAMES,
    DTYPES,
    ENCODER_PREFIX,
    SafetensorsFile,
    SafetensorsFiles,
    TensorDict,
    TensorInfo,
    TensorReader,
    encoder_of,
)
from sphinx_pl.checkpoints.writer import CheckpointWriter
from sphinx_pl.data.tokenizers import Tokenizer, copy_tokenizer, tokenizer_files
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.vision import build_encoder
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)

LEFT_OUT = "left_out"


class SphinxCheckpoint(Checkpoint):
    """Our own folder. The shards stay open (memory-mapped) as long as this object lives."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        # Hugging Face's folders have a config.json too, but without "format".
        return (path / CONFIG).is_file() and "format" in read_json(path / CONFIG)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        if self.config["format"] != FORMAT_VERSION:
            raise UserError(
                f"'{path / CONFIG}' has format {self.config['format']!r} but this version reads {FORMAT_VERSION}: "
                "use the version of sphinx_pl that wrote it, or a newer one"
            )
        check_sections(path / CONFIG, self.config)
        self.provenance = read_json(path / PROVENANCE)
        with sizes_of(path / CONFIG):
            self.left_out = {
                str(name): (TensorInfo(tuple(map(int, entry["shape"])), DTYPES[entry["dtype"]]), int(entry["crc32"]))
                for name, entry in self.config.get(LEFT_OUT, {}).items()
            }
            """Info and CRC-32 of the tensors that are read from `load` entries, by name."""
        self._released: dict[str, Callable[[str], Tensor]] = {}
        weight_map = read_weight_map(path / INDEX)
        require(path, self.tokenizer_file.name)
        self.shards = SafetensorsFiles(path, dict.fromkeys(weight_map.values()))
        for shard, file in self.shards.files.items():
            if different := set(file) ^ {name for name, place in weight_map.items() if place == shard}:
                raise UserError(
                    f"'{path / shard}' and {INDEX} disagree about '{min(different)}': copy the checkpoint again"
                )

    def __iter__(self) -> Iterator[str]:
        yield from self.shards
        yield from self.left_out

    def info(self, name: str) -> TensorInfo:
        return self.left_out[name][0] if name in self.left_out else self.shards.info(name)

    def tensor(self, name: str) -> Tensor:
        """Raises: UserError: it was left out and its source is gone, or holds another value now."""
        if name not in self.left_out:
            return self.shards.tensor(name)
        key = encoder_of(name)
        if key not in self._released:
            self._released[key] = released_values(self.model_config, key)
        info, crc = self.left_out[name]
        value = self._released[key](name).to(info.dtype)
        if _crc32(value) != crc:
            assert self.model_config.vision is not None
            section = self.model_config.vision.encoders[key]
            raise UserError(
                f"'{self.path}' leaves '{name}' to {section.section}.load={section.load}, which holds another value "
                "now: restore that file, or write the checkpoint again without leaving encoders out"
            )
        return value

    def unused(self) -> Iterable[tuple[str, Tensor]]:
        if not (self.path / UNUSED).is_file():
            return
        file = SafetensorsFile(self.path / UNUSED)
        yield from ((name, file.tensor(name)) for name in file)

    def files(self) -> Sequence[Path]:
        unused = [UNUSED] if (self.path / UNUSED).is_file() else []
        names = (CONFIG, INDEX, *self.shards.files, *unused)
        return [*tokenizer_files(self.tokenizer_file), *(self.path / name for name in names)]

    def raw(self) -> ModelFolder | None:
        return None if self.left_out else SphinxFolder(self)


FORMATS.register("sphinx_pl", SphinxCheckpoint)


class SphinxFolder(SafetensorsFolder):
    """Our own folder, whose copies have the same shards."""

    kind = "sphinx_pl"

    def __init__(self, checkpoint: SphinxCheckpoint) -> None:
        self.path, self.tensors, self.provenance = checkpoint.path, checkpoint.shards, checkpoint.provenance
        self.checkpoint = checkpoint

    def canonical(self) -> Checkpoint:
        return self.checkpoint

    def compare(self, other: SphinxFolder) -> str:
        return self.checkpoint.compare(other.checkpoint)

    def output(self, dtype: torch.dtype | None = None) -> OutputFolder:
        files = self.copies(dtype)

        def finish(folder: Path) -> None:
            write_index(folder, files)
            copy_tokenizer(self.checkpoint.tokenizer_file, folder)
            for name in (CONFIG, UNUSED):
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, folder / name)

        return OutputFolder(files, finish)


# -- writing ---------------------------------------------------------------------------------------


def check_free(
    path: Path,
    overwrite: bool,
    sources: Iterable[Path] = (),
    is_checkpoint: Callable[[Path], bool] = SphinxCheckpoint.matches,
) -> None:
    """Whether a checkpoint may be written to `path`.

    Args:
        sources: what the new checkpoint is made of.
        is_checkpoint: whether a folder holds a checkpoint, which alone may be overwritten.

    Raises:
        UserError: `path` exists and may not be overwritten, is something else than a checkpoint, or
            holds what nobody asked to delete: one of the sources, or folders, of which a checkpoint
            has none.
    """
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"'{path}' exists: choose another path, or allow it to be overwritten (overwrite=true)")
    for source in sources:
        if source.resolve().is_relative_to(path.resolve()):
            raise UserError(f"overwrite=true at '{path}' would delete '{source}', which is needed: choose another path")
    if not is_checkpoint(path):
        raise UserError(f"'{path}' is not a checkpoint, so overwrite=true does not replace it: choose another path")
    if folder := next((inside.name for inside in path.iterdir() if inside.is_dir()), None):
        raise UserError(
            f"overwrite=true would delete the folder '{folder}' in '{path}': choose another path, or move it"
        )


def write_checkpoint(
    path: str | Path,
    weights: TensorReader | Mapping[str, Tensor],
    model: dict[str, Any],
    processor: dict[str, Any],
    tokenizer: Path | Tokenizer,
    provenance: dict[str, Any] | Callable[[], dict[str, Any]],
    *,
    unused: Iterable[tuple[str, Tensor]] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: str | None = None,
    leave_out: Iterable[str] = (),
) -> Path:
    """Write a checkpoint folder; a reader sees all of it or none. A tensor is in memory at a time,
    of small ones two.

    Args:
        weights: a reader with canonical names, or a state dict.
        model: `SphinxConfig.to_dict()`.
        provenance: the content, or a function that makes it and is called once the weights are
            written.
        unused: see `Checkpoint.unused`.
        dtype: of floating-point tensors in the file; None keeps each one's own.
        max_shard_bytes: upper bound of a shard, unless a single tensor is larger.
        overwrite: replace what is at `path`.
        progress: a word for the progress bar; None shows none.
        leave_out: encoders that are not written, but read from their `load` entries. An encoder that
            differs from that entry is written nevertheless.

    Raises:
        UserError: `path` exists, or the tokenizer's file does not.
    """
    path = Path(path)
    check_free(path, overwrite)
    if isinstance(tokenizer, Path) and not tokenizer.is_file():
        raise UserError(f"tokenizer '{tokenizer}' does not exist: check the path")
    reader = TensorDict(weights) if isinstance(weights, Mapping) else weights
    config: dict[str, Any] = {"model": model, "processor": processor}
    if keys := list(leave_out):
        config[LEFT_OUT] = released_tensors(reader, SphinxConfig.from_dict(model), keys)
    files = native_folder(reader, config, tokenizer, unused, dtype, max_shard_bytes, config.get(LEFT_OUT, ()))

    def finish(folder: Path, facts: Any) -> None:
        write_json(folder / PROVENANCE, provenance() if callable(provenance) else provenance)

    CheckpointWriter(path, files, workers=2, progress=progress, overwrite=overwrite).write(reader, finish=finish)
    return path


# -- encoders that are left out --------------------------------------------------------------------


def released_tensors(reader: TensorReader, config: SphinxConfig, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and CRC-32 of the tensors of the encoders `keys` that equal their
    released weights, bit for bit."""
    equal: dict[str, dict[str, Any]] = {}
    for key in keys:
        released = released_values(config, key)
        entries = {}
        for name in (name for name in reader if encoder_of(name) == key):
            value = reader.tensor(name)
            if not torch.equal(released(name).to(value.dtype), value):
                log.warning("the encoder '%s' is kept: '%s' is not what its `load` entry names", key, name)
                break
            entries[name] = {"shape": list(value.shape), "dtype": DTYPE_NAMES[value.dtype], "crc32": _crc32(value)}
        else:
            equal |= entries
    return equal


def released_values(config: SphinxConfig, key: str) -> Callable[[str], Tensor]:
    """Return a function from the name of a tensor of the model to its released value.

    The released weights are those that the encoder's `load` names.

    Raises:
        UserError: see `sphinx_pl.checkpoints.encoders.load_pretrained`.
    """
    assert config.vision is not None
    with torch.device("meta"):
        encoder = build_encoder(config.vision, key)
    value = pretrained_values(encoder, config.vision.encoders[key].load)
    return lambda name: value(name.removeprefix(f"{ENCODER_PREFIX}{key}."))


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
