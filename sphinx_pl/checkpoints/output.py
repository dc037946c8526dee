"""The files of a model's folder as they are to be written, apart from the values.

An `OutputFolder` names files. For each tensor in a file, an `Entry` says which of the reader's
tensors it is made of.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from sphinx_pl.checkpoints.folder import INDEX, write_json
from sphinx_pl.checkpoints.tensors import DTYPE_NAMES, TensorInfo, TensorReader

MAX_SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its shape and dtype there, the reader's name of its source, and how it is
    made.

    Attributes:
        name: the reader's; None: the reader has no such tensor, and `make` is called without
            arguments.
        make: from the reader's tensor, whole and in `shape`; None: the values are those of the
            reader's tensor.
    """

    info: TensorInfo
    name: str | None
    make: Callable[..., Tensor] | None = None
    shape: tuple[int, ...] = ()


class OutputFile(ABC):
    """A file with room for named tensors."""

    def __init__(self, name: str, entries: Mapping[str, Entry]) -> None:
        self.name = name
        self.entries = dict(entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.info.nbytes for entry in self.entries.values())

    @abstractmethod
    def create(self, path: Path) -> dict[str, int]:
        """Make the file in full length; returns where each tensor's values begin."""


class SafetensorsOutput(OutputFile):
    """A safetensors file: 8 bytes with the header's length, the header as JSON, the values without
    gaps.

    As the library does, larger elements come first, so that every tensor is aligned.
    """

    def __init__(self, name: str, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(name, entries)
        self.metadata = dict(metadata or {})

    def create(self, path: Path) -> dict[str, int]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **self.metadata}}
        begins, end = {}, 0
        for name, entry in sorted(self.entries.items(), key=lambda item: -item[1].info.dtype.itemsize):
            begins[name] = end
            header[name] = {
                "dtype": DTYPE_NAMES[entry.info.dtype],
                "shape": list(entry.info.shape),
                "data_offsets": [end, end := end + entry.info.nbytes],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        size = 8 + len(text)
        _reserve(path, size + self.nbytes)
        return {name: size + begin for name, begin in begins.items()}


class TorchOutput(OutputFile):
    """A file of `torch.save` with `{wrap: {name: tensor}}`, or without `wrap` the tensors alone."""

    def __init__(self, name: str, entries: Mapping[str, Entry], wrap: str | None = None) -> None:
        super().__init__(name, entries)
        self.wrap = wrap

    def create(self, path: Path) -> dict[str, int]:
        before = get_crc32_options()
        set_crc32_options(False)  # of the holes it would be wrong
        try:
            with FakeTensorMode():
                content: Any = {n: torch.empty(e.info.shape, dtype=e.info.dtype) for n, e in self.entries.items()}
            with skip_data(materialize_fake_tensors=True):
                torch.save({self.wrap: content} if self.wrap else content, path)
        finally:
            set_crc32_options(before)
        _reserve(path, path.stat().st_size)
        with FakeTensorMode():  # reads no values, but says where they are
            content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = content[self.wrap] if self.wrap else content
        return {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in tensors.items()}


def _reserve(path: Path, size: int) -> None:
    """Allocate blocks for the whole file, so that a disk that is too small fails here."""
    with path.open("r+b") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)


@dataclass(frozen=True)
class OutputFolder:
    """The files of a model's weights, and a function that writes everything else."""

    files: list[OutputFile]
    finish: Callable[[Path], None] = field(default=lambda folder: None)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def names(self) -> set[str]:
        """The reader's tensors that the files are made of."""
        return {entry.name for file in self.files for entry in file.entries.values() if entry.name is not None}


def copies(reader: TensorReader, dtype: torch.dtype | None = None, without: Iterable[str] = ()) -> dict[str, Entry]:
    """Entries for the reader's tensors under its names; floating-point ones are cast to `dtype`."""
    left_out = set(without)
    return {name: Entry(reader.info(name).cast(dtype), name) for name in reader if name not in left_out}


def safetensors_folder(
    entries: Mapping[str, Entry], finish: Callable[[Path], None], max_bytes: int = MAX_SHARD_BYTES
) -> OutputFolder:
    """Shards of at most `max_bytes`, unless a single tensor has more, and their index."""
    shards: list[dict[str, Entry]] = []
    room = 0
    for name, entry in entries.items():
        if not shards or entry.info.nbytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = entry
        room -= entry.info.nbytes
    files: list[OutputFile] = [
        SafetensorsOutput(f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        for number, shard in enumerate(shards, 1)
    ]

    def whole(folder: Path) -> None:
        write_index(folder, files)
        finish(folder)

    return OutputFolder(files, whole)


def write_index(folder: Path, files: list[OutputFile]) -> None:
    """Write which file has which tensor, as Hugging Face does."""
    weight_map = {name: file.name for file in files for name in file.entries}
    write_json(
        folder / INDEX, {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weight_map}
    )
