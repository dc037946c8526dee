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

import errno
import hashlib
import json
import logging
import shutil
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor, nn

from sphinx_pl.checkpoints.encoders import pretrained_values
from sphinx_pl.checkpoints.folder import (
    CONFIG,
    INDEX,
    PROVENANCE,
    TOKENIZER,
    UNUSED,
    check_room,
    linked,
    move_into_place,
    read_json,
    read_weight_map,
    require,
    sizes_of,
    sync,
    unfinished,
    write_json,
)
from sphinx_pl.checkpoints.hub import local_folder
from sphinx_pl.checkpoints.provenance import hash_file
from sphinx_pl.checkpoints.tensors import (
    DTYPE_NAMES,
    DTYPES,
    TOWERS,
    SafetensorsFile,
    StateDict,
    TensorInfo,
    Weights,
    compare,
    copy_into,
    tower_of,
)
from sphinx_pl.checkpoints.unreadable import why_unreadable
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.encoders import build_tower
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.registry import Registry

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
LEFT_OUT = "left_out"


MAX_SHARD_BYTES = 2**30
AHEAD_BYTES = 2**29
"""Of a tensor that is being written and the next one, which is read meanwhile; larger ones wait for each other."""


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


def check_sections(file: Path, config: Mapping[str, Any]) -> None:
    """Raises: UserError: `file` does not say which model and prompt format the weights belong to."""
    if "${" in json.dumps(config):  # would be resolved, an environment variable for instance
        raise UserError(f"'{file}' holds an interpolation (${{...}}), which no checkpoint needs: remove it")
    for section in ("model", "processor"):
        if not isinstance(config.get(section), dict):
            raise UserError(f"'{file}' lacks the section '{section}': restore the file from its source")


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
                str(name): (TensorInfo(tuple(map(int, entry["shape"])), DTYPES[entry["dtype"]]), int(entry["crc32"]))
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
            load = getattr(self.model_config.vision, key).load
            raise UserError(
                f"'{self.path}' leaves '{name}' to model.vision.{key}.load={load}, which holds another value now: "
                "restore that file, or write the checkpoint again without leaving towers out"
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


def released_values(config: SphinxConfig, key: str) -> Callable[[str], Tensor]:
    """Name of a tensor of the model -> its value in the released weights that the tower's `load` names.

    Raises:
        UserError: see `sphinx_pl.checkpoints.encoders.load_pretrained`.
    """
    assert config.vision is not None
    with torch.device("meta"):
        tower = build_tower(config.vision, key)
    value = pretrained_values(tower, getattr(config.vision, key).load)
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
                entries[name] = {"shape": list(value.shape), "dtype": DTYPE_NAMES[value.dtype], "crc32": _crc32(value)}
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
            "dtype": DTYPE_NAMES[info.dtype],
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
