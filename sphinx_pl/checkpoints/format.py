"""Checkpoints that hold weights only: our folder, and the door through which other layouts come in.

    model-00001-of-00002.safetensors ...   the weights, each tensor once
    model.safetensors.index.json           tensor name -> shard, as Hugging Face writes it
    config.json                            {"format": 1, "model": SphinxConfig, "processor": prompt format}
                                           and "left_out": tensors that are read from their towers' `load` entries
    tokenizer.model                        SentencePiece
    provenance.json                        see `sphinx_pl.checkpoints.provenance`
    unused.safetensors                     of imported checkpoints: what no model here uses, kept for the way back

A folder is written under a temporary name and renamed, so whatever stands under the final name is complete.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

import torch
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sphinx_pl.checkpoints.provenance import hash_file
from sphinx_pl.checkpoints.unreadable import why_unreadable
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_pointer, replaced
from sphinx_pl.utils.registry import Registry

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.model"
PROVENANCE = "provenance.json"
UNUSED = "unused.safetensors"
LEFT_OUT = "left_out"
TOWERS = "mixer.towers."
"""Of the names of the towers' tensors."""
HUB = "hf-hub:"
_ON_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a stored tensor without reading its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


MAX_SHARD_BYTES = 2**30
AHEAD_BYTES = 2**29
"""Of a tensor that is being written and the next one, which is read meanwhile; larger ones wait for each other."""

MAPPED_BYTES = 2**29
"""What is read through mappings of files before they are dropped: mapped pages count as this process's memory."""


class Mapped(ABC):
    """Files that are mapped into memory. What is read through all of them together is bounded by `MAPPED_BYTES`."""

    _lock: ClassVar = Lock()
    _all: ClassVar[WeakSet[Mapped]] = WeakSet()

    def __init__(self) -> None:
        self._read = 0
        with Mapped._lock:
            Mapped._all.add(self)

    @abstractmethod
    def _drop(self) -> None:
        """Let go of the mappings and so of the pages that were read; the next access maps the files anew."""

    def _count(self, nbytes: int) -> None:
        """So many more bytes were read."""
        with Mapped._lock:
            self._read += nbytes
            if sum(file._read for file in Mapped._all) <= MAPPED_BYTES:
                return
            for file in Mapped._all:
                if file._read:
                    file._drop()
                    file._read = 0


class SafetensorsFile(Mapped):
    """One file, read a tensor at a time with bounded memory.

    Raises:
        UserError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._mapped: Any = None  # safetensors ships no types
        self._offsets: dict[str, int] | None = None
        self.keys: list[str] = self._file().offset_keys()
        """In the file's own order, in which a pass over all tensors is one sequential read."""

    def _drop(self) -> None:
        self._mapped = None

    def _file(self) -> Any:
        if (mapped := self._mapped) is not None:
            return mapped
        if not self.path.is_file():
            raise UserError(f"'{self.path}' is missing: copy the checkpoint again, whole")
        check_pointer(self.path)
        try:
            mapped = self._mapped = safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{self.path}' is damaged ({error}): copy the checkpoint again") from error
        return mapped

    def info(self, name: str) -> TensorInfo:
        view = self._file().get_slice(name)
        if view.get_dtype() not in _DTYPES:
            raise UserError(
                f"'{self.path}': '{name}' is stored as {view.get_dtype()}, which this project does not read"
            )
        return TensorInfo(tuple(view.get_shape()), _DTYPES[view.get_dtype()])

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file().get_tensor(name)
        self._count(tensor.nbytes)
        return tensor

    def read_into(self, out: Tensor, name: str, start: int) -> None:
        """Fill `out` (contiguous, of the stored dtype) with elements of the flattened tensor from `start` on.

        They are read, not mapped, so that nothing but `out` takes memory.

        Raises:
            UserError: the file is gone or has become shorter.
        """
        with self.reader(name) as read:  # opened each time: there can be more files than a process may have open
            read(out, start)

    @contextmanager
    def reader(self, name: str) -> Iterator[Callable[[Tensor, int], None]]:
        """`read_into` of one tensor for many stretches of it. Several threads may each have one."""
        begin = self._offset(name)

        def read(out: Tensor, start: int) -> None:
            rest: memoryview = out.view(-1).view(torch.uint8).numpy().data
            place = begin + start * out.itemsize
            while rest:
                if not (count := os.preadv(descriptor, [rest], place)):
                    raise UserError(f"'{self.path}' is damaged (it ends too early): copy the checkpoint again")
                rest, place = rest[count:], place + count

        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                yield read
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"'{self.path}' cannot be read ({error}): copy the checkpoint again") from error

    def _offset(self, name: str) -> int:
        """Where in the file the values of a tensor begin."""
        if self._offsets is None:
            with self.path.open("rb") as file:  # whose header was checked when it was mapped
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            self._offsets = {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items()}
        return self._offsets[name]

    def metadata(self) -> dict[str, str]:
        return self._file().metadata() or {}


class Weights(Protocol):
    """Named tensors that are read or made one at a time, in the order of iteration."""

    def __iter__(self) -> Iterator[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def tensor(self, name: str) -> Tensor: ...


class StateDict:
    """A module's tensors as `Weights`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self._tensors[name].shape), self._tensors[name].dtype)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class Checkpoint(ABC):
    """`Weights` with what it takes to use them. A format is a subclass in `FORMATS`."""

    path: Path
    config: dict[str, Any]
    provenance: dict[str, Any]

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether `path` looks like this format. Cheap; the constructor is what validates."""

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @abstractmethod
    def keys(self) -> Sequence[str]:
        """Names of all tensors, in the order in which they are best read."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    @abstractmethod
    def info(self, name: str) -> TensorInfo: ...

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, in the dtype in which it is stored."""

    def unused(self) -> Iterable[tuple[str, Tensor]]:
        """Tensors, under their own layout's names, that belong to no module here."""
        return ()

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The files whose content makes this checkpoint."""

    @property
    @abstractmethod
    def tokenizer_file(self) -> Path: ...

    def tokenizer(self) -> Path:
        """`tokenizer_file`, if it is there.

        Raises:
            UserError: it isn't.
        """
        if not self.tokenizer_file.is_file():
            raise UserError(f"'{self.tokenizer_file}' is missing: put the model's tokenizer there")
        return self.tokenizer_file

    @property
    def model_config(self) -> SphinxConfig:
        return SphinxConfig.from_dict(self.config["model"])

    @property
    def processor(self) -> dict[str, Any]:
        """The prompt format that the model was trained with."""
        processor: dict[str, Any] = self.config["processor"]
        return processor

    def identity(self) -> dict[str, Any]:
        """What a child's provenance keeps of this checkpoint: path, stage and a SHA-256 over its files (reads them)."""
        digest = hashlib.sha256()
        for file in sorted(self.files()):
            digest.update(f"{file.name} {hash_file(file)}\n".encode())
        return {"path": str(self.path), "stage": self.provenance.get("stage"), "sha256": digest.hexdigest()}

    def load_into(self, module: nn.Module, part: str = "") -> None:
        """Copy every weight into `module` (a `Sphinx`), keeping the module's dtypes and devices.

        Args:
            part: "decoder.", say: `module` is that part of a `Sphinx`, and only its weights are read.

        Raises:
            UserError: names or shapes differ; nothing is copied then.
        """
        self.check(module, part)
        names = (name for name in self if name.startswith(part))
        copy_into(module.state_dict(prefix=part), ((name, self.tensor(name)) for name in names))

    def check(self, module: nn.Module, part: str = "") -> None:
        """Raises: UserError: the weights of `module` (which may be on the meta device) have other names or shapes."""
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict(prefix=part).items()}
        if problem := compare(wanted, {name: self.info(name).shape for name in self if name.startswith(part)}):
            raise UserError(f"checkpoint '{self.path}' does not fit this model: {problem}")


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `tensors` in place over those of the same name in `target` (a state dict), one by one."""
    for name, tensor in tensors:
        target[name].copy_(tensor)


def compare(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """How the tensors of two models differ, in a phrase that names the first few; "" if they do not."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    misshaped = [name for name in wanted if name in found and wanted[name] != found[name]]

    def near(name: str, candidates: list[str]) -> str:
        matches = difflib.get_close_matches(name, candidates[:1000], n=1, cutoff=0.8)
        return f"'{name}' (it has '{matches[0]}')" if matches else f"'{name}'"

    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: " + ", ".join(near(name, extra) for name in missing[:3]))
    if extra:
        parts.append(f"{len(extra)} unexpected: " + ", ".join(repr(name) for name in extra[:3]))
    if misshaped:
        shapes = (f"'{name}' is {list(found[name])} instead of {list(wanted[name])}" for name in misshaped[:3])
        parts.append(f"{len(misshaped)} of another shape: " + ", ".join(shapes))
    return "; ".join(parts)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their bytes."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit: distinguishes 0 from -0 and equates NaN with itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = _INTEGERS.get(a.itemsize, torch.uint8)
    return torch.equal(a.contiguous().view(-1).view(kind), b.contiguous().view(-1).view(kind))


FORMATS: Registry[type[Checkpoint]] = Registry("checkpoint format")


_IRRELEVANT = ("name", "load", "max_length")
"""Last parts of configuration keys that may differ: they change neither what a weight means nor the prompt format."""


def differences(a: Mapping[str, Any], b: Mapping[str, Any], section: str) -> list[str]:
    """Where two `model` or `processor` sections differ in what weights depend on: "key is x and y" each."""
    x, y = _flatten(a, section), _flatten(b, section)
    return [f"{key} is {x.get(key)!r} and {y.get(key)!r}" for key in sorted({*x, *y}) if x.get(key) != y.get(key)]


def _flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}.{key}")
        elif key not in _IRRELEVANT:
            flat[f"{prefix}.{key}"] = value
    return flat


def local_folder(path: str | Path) -> Path:
    """Where the checkpoint lies that `open_checkpoint` opens: the path itself, or the copy of what the hub has.

    Raises:
        UserError: there is none.
    """
    path = _from_hub(path) if isinstance(path, str) and path.startswith(HUB) else Path(path)
    if not path.exists():
        hub = f", or write {HUB}{path} for a model of the hub" if _ON_HUB.fullmatch(str(path)) else ""
        raise UserError(f"checkpoint '{path}' does not exist: check the path{hub}")
    return path


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open and validate the checkpoint at `path`, in whichever of `FORMATS` it is.

    Args:
        path: a folder, or `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME/FOLDER` for one of a repository in the Hugging Face
            cache, or downloaded to it.

    Raises:
        UserError: there is none, or it is damaged or of a version that this code does not know.
    """
    path = local_folder(path)
    if reader := _reader_of(path):
        return reader(path)
    inside = [folder for folder in sorted(path.glob("*")) + sorted(path.glob("*/*")) if _reader_of(folder)]
    why = f"did you mean '{inside[-1]}' in it?" if inside else why_unreadable(path, CONFIG)
    raise UserError(f"'{path}' is not a checkpoint of a known format ({', '.join(FORMATS)}): {why}")


def _reader_of(path: Path) -> type[Checkpoint] | None:
    return next((reader for reader in FORMATS.values() if reader.matches(path)), None)


# What the formats read, of a folder; not of folders in it, which hold other formats' copies in some repositories.
_HUB_FILES = ("*.json", TOKENIZER, "model*.safetensors", "consolidated.*.pth")


def hub_snapshot(repository: str, patterns: Sequence[str]) -> Path:
    """The files of a repository: as the Hugging Face cache has them if it has weights, else downloaded.

    Raises what the library does.
    """
    from huggingface_hub import HfApi, snapshot_download

    wanted = list(patterns)
    try:
        cached = Path(snapshot_download(repository, local_files_only=True, allow_patterns=wanted))
        # Another folder of the repository may be all that is cached.
        if any(any(cached.glob(pattern)) for pattern in wanted if pattern.endswith((".safetensors", ".pth"))):
            return cached
    except FileNotFoundError:
        pass
    HfApi().model_info(repository, timeout=10)  # without a network the download would try for minutes
    return Path(snapshot_download(repository, allow_patterns=wanted))


def _from_hub(source: str) -> Path:
    from huggingface_hub import constants

    parts = source.removeprefix(HUB).split("/")
    if len(parts) < 2 or not all(parts):
        raise UserError(f"'{source}' is no name of a model: it has the form {HUB}OWNER/NAME or {HUB}OWNER/NAME/FOLDER")
    owner, name, *folder = parts
    repository, inside = f"{owner}/{name}", "/".join(folder)
    patterns = ["/".join([*folder, pattern]) for pattern in _HUB_FILES]
    try:
        return hub_snapshot(repository, patterns) / inside
    except Exception as error:  # of many libraries: no network, no such model, no access, a name that is none
        include = " ".join(f"'{pattern}'" for pattern in patterns)
        raise UserError(
            f"'{source}' is neither in '{constants.HF_HUB_CACHE}' nor downloadable ({type(error).__name__}): run `hf "
            f"download {repository} --include {include}` on a machine with a network and copy models--{owner}--{name} "
            "into that folder, or give the path of a folder with these files"
        ) from error


def check_sections(file: Path, config: Mapping[str, Any]) -> None:
    """Raises: UserError: `file` does not say which model and prompt format the weights belong to."""
    if "${" in json.dumps(config):  # would be resolved, an environment variable for instance
        raise UserError(f"'{file}' holds an interpolation (${{...}}), which no checkpoint needs: remove it")
    for section in ("model", "processor"):
        if not isinstance(config.get(section), dict):
            raise UserError(f"'{file}' lacks the section '{section}': restore the file from its source")


def require(folder: Path, name: str) -> None:
    """Raises: UserError: the folder lacks that file."""
    if not (folder / name).is_file():
        raise UserError(f"'{folder / name}' is missing: copy the checkpoint again, whole")


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
            self._left_out = {
                str(name): (TensorInfo(tuple(map(int, entry["shape"])), _DTYPES[entry["dtype"]]), int(entry["crc32"]))
                for name, entry in self.config.get(LEFT_OUT, {}).items()
            }
        self._sources: dict[str, Callable[[str], Tensor]] = {}
        weight_map = read_weight_map(path / INDEX)
        self._shard_of: dict[str, str] = weight_map
        require(path, TOKENIZER)
        self._shards: dict[str, SafetensorsFile] = {}
        for shard in dict.fromkeys(weight_map.values()):
            self._shards[shard] = SafetensorsFile(path / shard)
            stored = set(self._shards[shard].keys)
            named = {name for name, place in weight_map.items() if place == shard}
            if stored != named:
                example = min(stored ^ named)
                raise UserError(f"'{path / shard}' and {INDEX} disagree about '{example}': copy the checkpoint again")

    def keys(self) -> Sequence[str]:
        return [*(name for shard in self._shards.values() for name in shard.keys), *self._left_out]

    def info(self, name: str) -> TensorInfo:
        if name in self._left_out:
            return self._left_out[name][0]
        return self._shards[self._shard_of[name]].info(name)

    def tensor(self, name: str) -> Tensor:
        """Raises: UserError: it was left out and its source is gone, or holds another value now."""
        if name not in self._left_out:
            return self._shards[self._shard_of[name]].tensor(name)
        key = tower_of(name)
        if key not in self._sources:
            self._sources[key] = released_values(self.model_config, key)
        info, crc = self._left_out[name]
        value = self._sources[key](name).to(info.dtype)
        if _crc32(value) != crc:
            assert self.model_config.vision is not None
            section = self.model_config.vision.encoders[key]
            raise UserError(
                f"'{self.path}' leaves '{name}' to {section.section}.load={section.load}, which holds another value "
                "now: restore that file, or write the checkpoint again without leaving encoders out"
            )
        return value

    @property
    def shards(self) -> Sequence[str]:
        """Names of the files with its weights."""
        return list(self._shards)

    @property
    def left_out(self) -> Mapping[str, Any]:
        """What is known of the tensors that are read from their towers' `load` entries, by name."""
        return self._left_out

    def unused(self) -> Iterable[tuple[str, Tensor]]:
        if not (self.path / UNUSED).is_file():
            return
        file = SafetensorsFile(self.path / UNUSED)
        yield from ((name, file.tensor(name)) for name in file.keys)

    def files(self) -> Sequence[Path]:
        unused = [UNUSED] if (self.path / UNUSED).is_file() else []
        return [self.path / name for name in (CONFIG, INDEX, TOKENIZER, *self._shards, *unused)]

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER


FORMATS.register("sphinx_pl", SphinxCheckpoint)


def tower_of(name: str) -> str:
    """Key of the tower that a tensor belongs to; "" for the rest of the model."""
    return name.removeprefix(TOWERS).split(".")[0] if name.startswith(TOWERS) else ""


def released_values(config: SphinxConfig, key: str) -> Callable[[str], Tensor]:
    """Name of a tensor of the model -> its value in the released weights that the tower's `load` names.

    Raises:
        UserError: see `sphinx_pl.checkpoints.encoders.load_pretrained`.
    """
    from sphinx_pl.checkpoints.encoders import pretrained_values  # which imports this module
    from sphinx_pl.models.vision import build_encoder

    assert config.vision is not None
    with torch.device("meta"):
        encoder = build_encoder(config.vision, key)
    value = pretrained_values(encoder, config.vision.encoders[key].load)
    return lambda name: value(name.removeprefix(f"{TOWERS}{key}."))


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


class Without:
    """`Weights` without those of the towers in `keys` that are what their sources hold, bit for bit."""

    def __init__(self, weights: Weights, config: SphinxConfig, keys: Iterable[str]) -> None:
        self._weights = weights
        self.left_out: dict[str, dict[str, Any]] = {}
        """What a reader has to know of each: shape, dtype, CRC-32."""
        for key in keys:
            source = released_values(config, key)
            entries = {}
            for name in (name for name in weights if tower_of(name) == key):
                value = weights.tensor(name)
                if not torch.equal(source(name).to(value.dtype), value):
                    log.warning("the tower '%s' is kept: '%s' is not what its `load` entry names", key, name)
                    break
                entries[name] = {"shape": list(value.shape), "dtype": _NAMES[value.dtype], "crc32": _crc32(value)}
            else:
                self.left_out |= entries

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._weights if name not in self.left_out)

    def info(self, name: str) -> TensorInfo:
        return self._weights.info(name)

    def tensor(self, name: str) -> Tensor:
        return self._weights.tensor(name)


def write_checkpoint(
    path: str | Path,
    weights: Weights | Mapping[str, Tensor],
    model: dict[str, Any],
    processor: dict[str, Any],
    tokenizer_file: Path,
    provenance: dict[str, Any] | Callable[[], dict[str, Any]],
    *,
    unused: Iterable[tuple[str, Tensor]] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: str | None = None,
    leave_out: Iterable[str] = (),
) -> Path:
    """Write a checkpoint folder; a reader sees all of it or none. A tensor is in memory at a time, of small ones two.

    Args:
        weights: or a state dict.
        model: `SphinxConfig.to_dict()`.
        provenance: or what makes it, called once the weights are written.
        unused: see `Checkpoint.unused`.
        dtype: of floating-point tensors in the file; None keeps each one's own.
        max_shard_bytes: upper bound of a shard, unless a single tensor is larger.
        overwrite: replace what is at `path`.
        progress: a word for the progress bar; None shows none.
        leave_out: towers that are not written, but read from their `load` entries again; where one is not what that
            entry names, it is written after all.

    Raises:
        UserError: `path` exists, or the tokenizer's file does not.
    """
    path = Path(path)
    check_free(path, overwrite)
    if not tokenizer_file.is_file():
        raise UserError(f"tokenizer '{tokenizer_file}' does not exist: check the path")
    weights = StateDict(weights) if isinstance(weights, Mapping) else weights
    config = {"format": FORMAT_VERSION, "model": model, "processor": processor}
    if keys := list(leave_out):
        weights = Without(weights, SphinxConfig.from_dict(model), keys)
        config[LEFT_OUT] = weights.left_out
    with staged(path, overwrite) as folder:
        write_shards(folder, weights, dtype, max_shard_bytes, progress)
        if kept := StateDict(dict(unused)):
            write_safetensors(folder / UNUSED, {name: kept.info(name) for name in kept}, kept.tensor)
        write_json(folder / CONFIG, config)
        write_json(folder / PROVENANCE, provenance() if callable(provenance) else provenance)
        shutil.copyfile(tokenizer_file, folder / TOKENIZER)
    return path


@contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write files into: renamed to `path` at the end, in place of what is there; removed on errors."""
    path = linked(path)
    folder = unfinished(path)
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        sync(*folder.iterdir(), folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk of '{path}' is full: free some space, or choose another folder") from error
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    move_into_place(folder, path, overwrite)


def check_room(path: Path, nbytes: int) -> None:
    """Raises: UserError: the disk that `path` will be on has less space than that."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(there).free) < nbytes:
        raise UserError(f"'{path}' needs {decimal(nbytes)}, and the disk has {decimal(free)} left: free some space")


def check_free(
    path: Path,
    overwrite: bool,
    sources: Iterable[Path] = (),
    is_checkpoint: Callable[[Path], bool] = SphinxCheckpoint.matches,
) -> None:
    """Whether a checkpoint may be written there.

    Args:
        sources: what it is made of.

    Raises:
        UserError: `path` exists and may not be overwritten, is something else than a checkpoint, or holds what nobody
            asked to delete: one of the sources, or folders, of which a checkpoint has none.
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


def into_shards(infos: Mapping[str, TensorInfo], max_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """The names, in order, in groups of at most so many bytes, unless a single tensor has more."""
    shards: list[list[str]] = []
    room = 0
    for name, info in infos.items():
        if not shards or info.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= info.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_shards(
    folder: Path,
    weights: Weights,
    dtype: torch.dtype | None = None,
    max_bytes: int = MAX_SHARD_BYTES,
    progress: str | None = None,
) -> None:
    """Safetensors files of at most `max_bytes` (unless a single tensor has more) and their index, as Hugging Face's."""
    infos = {name: _stored_as(weights.info(name), dtype) for name in weights}
    shards = [{name: infos[name] for name in names} for names in into_shards(infos, max_bytes)]
    total = sum(info.nbytes for info in infos.values())
    check_room(folder, total)
    weight_map: dict[str, str] = {}
    with progress_bar(progress, total) as written:
        for name, shard in zip(shard_names(len(shards)), shards, strict=True):
            write_safetensors(folder / name, shard, weights.tensor, written)
            weight_map |= dict.fromkeys(shard, name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


@contextmanager
def progress_bar(description: str | None, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes per second and the time left, and what moves it by so many bytes; None shows none."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=description is None) as bar:
        task = bar.add_task(description or "", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def _one_ahead(
    names: Iterable[str], infos: Mapping[str, TensorInfo], values: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Names and values; the next value is made in another thread while the caller writes one, if both are small."""
    waiting: deque[tuple[str, Future[Tensor]]] = deque()

    def first() -> tuple[str, Tensor]:
        name, future = waiting.popleft()
        return name, future.result()

    with ThreadPoolExecutor(1) as reader:
        for name in names:
            if waiting and infos[waiting[0][0]].nbytes + infos[name].nbytes > AHEAD_BYTES:
                yield first()
            waiting.append((name, reader.submit(values, name)))
            if len(waiting) > 1:
                yield first()
        if waiting:
            yield first()


def _stored_as(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.shape, dtype) if dtype is not None and info.dtype.is_floating_point else info


def safetensors_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file, and where in the file each tensor's values begin, in the order of the file.

    Layout: 8 bytes with the header's length, the header as JSON, the values without gaps. As the library does, larger
    elements come first, so that every tensor is aligned.
    """
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begins, end = {}, 0
    for name in ordered:
        info = tensors[name]
        begins[name] = end
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end := end + info.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text
    return data, {name: len(data) + begin for name, begin in begins.items()}


def write_safetensors(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    values: Callable[[str], Tensor],
    written: Callable[[int], None] = lambda nbytes: None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One file, a tensor at a time. The library's own writer holds all of them, twice.

    Args:
        values: name -> value, which is cast to the dtype in `tensors`.
        written: told how many bytes each tensor had.
        metadata: kept in the header.
    """
    header, offsets = safetensors_header(tensors, metadata)
    with file.open("wb") as out:
        out.write(header)
        for name, tensor in _one_ahead(offsets, tensors, values):
            value = tensor.detach().to("cpu", tensors[name].dtype).contiguous()
            if tuple(value.shape) != tensors[name].shape:
                raise ValueError(f"'{name}' is {list(value.shape)}, announced as {list(tensors[name].shape)}")
            out.write(value.flatten().view(torch.uint8).numpy().data)
            written(value.nbytes)
            del tensor, value  # before the next one is made


def linked(path: Path) -> Path:
    """Where it points to if it is a link: what is written in its place is to lie there."""
    return path.resolve() if path.is_symlink() else path


def unfinished(path: Path) -> Path:
    """What a folder is called until all of it is there."""
    return path.with_name(f".{path.name}.tmp")


def move_into_place(folder: Path, path: Path, overwrite: bool = True) -> None:
    """Rename a folder that is complete to `path`, in place of what is there.

    Raises:
        UserError: something has appeared there that may not be overwritten.
    """
    old = replaced(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():  # a folder cannot be renamed over one that is not empty
        if not overwrite:
            raise UserError(
                f"'{path}' was made by somebody else meanwhile: what was to be there is whole in '{folder}'"
            )
        path.rename(old)
    folder.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(*paths: Path) -> None:
    """What was written to these files and folders is on the disk when this returns."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable, and half a character (a lone surrogate), which UTF-8 cannot hold, as JSON escapes it."""
    path.write_bytes((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def read_provenance(folder: Path) -> dict[str, Any]:
    """Of a folder in somebody's layout, which has one if this project wrote it."""
    return read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    check_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing: copy the checkpoint again, whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): restore the file from its source") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' does not hold a JSON object: restore the file from its source")
    return content


@contextmanager
def sizes_of(file: Path) -> Iterator[None]:
    """What a size that `file` lacks, or that is none, leads to becomes one line."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"'{file}' lacks {error}: restore the file from its source") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"'{file}' has a size that cannot be ({error}): restore the file from its source") from error


def read_weight_map(path: Path) -> dict[str, str]:
    """Of an index: tensor name -> shard, which is the name of a file beside the index and no path to another place."""
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values())
    ):
        raise UserError(f"'{path}' has no weight_map: restore the file from its source")
    return weight_map
