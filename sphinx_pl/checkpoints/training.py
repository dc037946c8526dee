"""Checkpoints that a run resumes from: what every rank holds, in shards, readable by any number of
ranks.

    training.json                       shapes, files, their sizes, model and prompt format
    pieces-00000-of-00002.safetensors   of one rank: shards of weights and of optimizer states
    state.pt                            loops, schedule, callbacks, data position: no pickled code
    tokenizer.*, provenance.json        as beside every model

A shard is a stretch of a flattened tensor: all of it where a process holds whole tensors, a rank's
partition under ZeRO-3, some rows under FSDP2. A reader does not need to know which engine wrote it.
Weights are those that the optimizer works on (float32 masters where there are any), so the folder
is also a checkpoint like any other: `open_checkpoint` reads it a tensor at a time.

Damage to what says where a value lies (training.json, a file's header, which holds a sum of itself)
is detected. Damage to the values is not, as in every other format.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.checkpoints.folder import PROVENANCE, check_sections, read_json, require, sync, write_json
from sphinx_pl.checkpoints.format import FORMATS, Checkpoint
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.checkpoints.output import SafetensorsOutput, copies
from sphinx_pl.checkpoints.tensors import Read, SafetensorsFile, TensorDict, TensorInfo, TensorReader, TensorView
from sphinx_pl.checkpoints.writer import write_file
from sphinx_pl.data.tokenizers import Tokenizer, copy_tokenizer, tokenizer_files
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import hash_file

FORMAT_VERSION = 1
INDEX = "training.json"
STATE = "state.pt"
WEIGHT = "weight"
"""Kind of the shards of weights; the other kinds are the optimizer's names of its states."""
ANOTHER = "use another checkpoint of the run (ckpt_path=.../step-N overwrite=true)"


@dataclass(frozen=True, slots=True)
class TensorShard:
    """Elements `start`, `start + 1`, ... of the flattened tensor `kind` of a parameter."""

    kind: str
    name: str
    start: int
    values: Tensor  # [n], on any device


@dataclass(frozen=True, slots=True)
class ShardMetadata:
    """Which elements of a flattened tensor a shard in a file holds: `count` from `start` on."""

    start: int
    count: int
    dtype: torch.dtype


def _sum(shards: Mapping[str, ShardMetadata]) -> str:
    """A SHA-256 of what a file's header says."""
    content = sorted((key, shard.start, shard.count, str(shard.dtype)) for key, shard in shards.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def file_name(rank: int, ranks: int) -> str:
    return f"pieces-{rank:05d}-of-{ranks:05d}.safetensors"


# -- writing ---------------------------------------------------------------------------------------


def write_shards(folder: Path, rank: int, ranks: int, shards: Iterable[TensorShard]) -> None:
    """Write this rank's file, which is on the disk when this returns.

    A few shards at a time are copied to the CPU.
    """
    held = {f"{shard.kind}/{shard.name}": shard for shard in shards}
    reader = TensorDict({key: shard.values for key, shard in held.items()})
    infos = {key: reader.info(key) for key in reader}
    metadata = {key: ShardMetadata(held[key].start, info.numel, info.dtype) for key, info in infos.items()}
    starts = json.dumps({key: shard.start for key, shard in metadata.items() if shard.start})
    file = folder / file_name(rank, ranks)
    write_file(file, SafetensorsOutput(file.name, copies(reader), {"starts": starts, "sum": _sum(metadata)}), reader)
    sync(file)


def write_rest(folder: Path, ranks: int, shapes: Mapping[str, Sequence[int]], state: Mapping[str, Any]) -> None:
    """Write, on one rank, what is no shard, when all shards are there. `describe` completes the
    folder.

    Args:
        shapes: of every tensor of the model.
        state: everything that is no shard.
    """
    content = io.BytesIO()
    torch.save(dict(state), content)
    (folder / STATE).write_bytes(content.getbuffer())  # whose errors say what is wrong with the disk, as torch's do not
    names = [file_name(rank, ranks) for rank in range(ranks) if (folder / file_name(rank, ranks)).exists()]
    files = {name: (folder / name).stat().st_size for name in [*names, STATE]}
    shapes = {name: list(shape) for name, shape in shapes.items()}
    index = {"format": FORMAT_VERSION, "ranks": ranks, "files": files, "state": hash_file(folder / STATE)}
    write_json(folder / INDEX, index | {"shapes": shapes})


def describe(
    folder: Path,
    model: dict[str, Any],
    processor: dict[str, Any],
    tokenizer: Path | Tokenizer,
    provenance: dict[str, Any],
) -> None:
    """Make the folder a checkpoint of a model: see `write_checkpoint` for the arguments."""
    copy_tokenizer(tokenizer, folder)
    write_json(folder / PROVENANCE, provenance)
    write_json(folder / INDEX, read_json(folder / INDEX) | {"model": model, "processor": processor})


# -- reading ---------------------------------------------------------------------------------------


def _count(value: Any) -> int:
    """Raises: ValueError: it is no number of things."""
    if type(value) is not int or not 0 <= value < 2**60:
        raise ValueError(f"{value!r:.50} is no count")
    return value


def _file_names(sizes: Mapping[str, int], ranks: int) -> list[str]:
    """The files with shards, by rank; each lies in the folder itself. Not every rank must have one.

    Raises: ValueError: a name that `write_rest` does not write.
    """
    names = {}
    for name in set(sizes) - {STATE}:
        match = re.match(r"pieces-(\d+)-of-", name)
        if match is None or (rank := int(match[1])) >= ranks or name != file_name(rank, ranks):
            raise ValueError(f"a file {name!r:.100}")
        names[rank] = name
    if STATE not in sizes or not names:
        raise ValueError("files are left out")
    return [names[rank] for rank in sorted(names)]


class TrainingShards(TensorReader):
    """The tensors of a training checkpoint under canonical names. Any stretch of one is read from
    few files.

    Raises:
        UserError: a file is missing, cut short, or of a version that this code does not know.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_json(folder / INDEX)
        if self.index.get("format") != FORMAT_VERSION:
            raise UserError(
                f"'{folder / INDEX}' has format {self.index.get('format')!r} but this version reads {FORMAT_VERSION}: "
                "resume with the version of sphinx_pl that wrote it, or start from its weights (stage.init_from)"
            )
        try:
            self.ranks = _count(self.index["ranks"])
            self.shapes = {name: tuple(_count(n) for n in shape) for name, shape in self.index["shapes"].items()}
            sizes = {name: _count(size) for name, size in self.index["files"].items()}
            self._names = _file_names(sizes, self.ranks)
            if any(math.prod(shape) >= 2**60 for shape in self.shapes.values()):
                raise ValueError("a shape that no tensor has")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(folder / INDEX, error) from None
        for name, size in sizes.items():
            present = (folder / name).stat().st_size if (folder / name).is_file() else -1
            if present != size:
                what = "is missing" if present < 0 else f"has {present:,} bytes instead of {size:,}"
                raise UserError(f"'{folder / name}' {what}: {ANOTHER}")
        self._files: dict[str, tuple[SafetensorsFile, dict[str, ShardMetadata]]] = {}

    @staticmethod
    def _damaged(path: Path, why: object) -> UserError:
        return UserError(f"'{path}' is damaged ({why!r}): {ANOTHER}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.shapes[name], self.dtype(name))

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """Raises: UserError: no file has a shard of it."""
        for file in self._near(0, 1):
            if shard := self._file(file)[1].get(f"{kind}/{name}"):
                return shard.dtype
        raise UserError(f"'{self.folder}' lacks {kind} of '{name}': {ANOTHER}")

    def tensor(self, name: str) -> Tensor:
        return self.read(name).view(self.shapes[name])

    @contextmanager
    def open(self, name: str) -> Iterator[Read]:
        def read(out: Tensor, start: int) -> None:
            out.copy_(self.read(name, start, start + len(out)))

        yield read

    def kinds(self) -> list[str]:
        """Kinds of optimizer states that there are."""
        kinds = {key.split("/", 1)[0] for file in self._names for key in self._file(file)[1]}
        return sorted(kinds - {WEIGHT})

    def has(self, name: str, kind: str) -> bool:
        return any(f"{kind}/{name}" in self._file(file)[1] for file in self._near(0, 1))

    def read(self, name: str, start: int = 0, stop: int | None = None, kind: str = WEIGHT) -> Tensor:
        """Elements [start, stop) of the flattened tensor. Only these bytes are read.

        Raises:
            UserError: some of them are in no file, or in two.
        """
        numel = math.prod(self.shapes[name])
        stop = numel if stop is None else stop
        if stop <= start:
            return torch.empty(0, dtype=self.dtype(name, kind))
        key, missing = f"{kind}/{name}", stop - start
        parts: list[tuple[int, int, SafetensorsFile, ShardMetadata]] = []
        for name_of_file in self._near(start, numel):
            file, shards = self._file(name_of_file)
            if (shard := shards.get(key)) is None:
                continue
            a, b = max(start, shard.start), min(stop, shard.start + shard.count)
            if a >= b:
                continue
            if any(a < other_b and other_a < b for other_a, other_b, *_ in parts):
                raise self._damaged(file.path, f"a part of {kind} of '{name}' is in two files")
            if parts and shard.dtype != parts[0][3].dtype:
                raise self._damaged(file.path, f"{kind} of '{name}' is {shard.dtype} and {parts[0][3].dtype}")
            parts.append((a, b, file, shard))
            missing -= b - a
            if not missing:
                break
        if missing:
            raise UserError(f"'{self.folder}' lacks a part of {kind} of '{name}': {ANOTHER}")
        out = torch.empty(stop - start, dtype=parts[0][3].dtype)
        for a, b, file, shard in parts:
            with file.open(key) as read:
                read(out[a - start : b - start], a - shard.start)
        return out

    def _near(self, start: int, numel: int) -> Iterator[str]:
        """All files, those first that should hold this place: a rank opens few beside its own."""
        guess = min(len(self._names) - 1, start * len(self._names) // max(numel, 1))
        order = sorted(range(len(self._names)), key=lambda i: (abs(i - guess), i))
        return (self._names[i] for i in order)

    def _file(self, name: str) -> tuple[SafetensorsFile, dict[str, ShardMetadata]]:
        """A file, and which shard it has under a key."""
        if name not in self._files:
            file = SafetensorsFile(self.folder / name)
            metadata = file.metadata()
            try:
                starts, shards = json.loads(metadata["starts"]), {}
                for key in file:
                    info = file.info(key)
                    (count,) = info.shape
                    shard = shards[key] = ShardMetadata(_count(starts.get(key, 0)), count, info.dtype)
                    if shard.start + shard.count > math.prod(self.shapes[key.split("/", 1)[1]]):
                        raise ValueError(f"more of '{key}' than there is")
                if metadata["sum"] != _sum(shards):
                    raise ValueError("its header is not what was written")
            except (KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError) as error:
                raise self._damaged(file.path, error) from None
            self._files[name] = file, shards
        return self._files[name]

    def state(self) -> dict[str, Any]:
        """The content that `write_rest` got. Only tensors and plain values are unpickled.

        Raises:
            UserError: the file is not the one that was written, or holds something else.
        """
        path = self.folder / STATE
        if hash_file(path) != self.index.get("state"):
            raise self._damaged(path, "its SHA-256 is not the one that was written")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a foreign file makes torch raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"'{path}' cannot be read ({reason}): {ANOTHER}") from None
        if not isinstance(state, dict):
            raise self._damaged(path, f"it holds a {type(state).__name__}")
        return state


class TrainingCheckpoint(TensorView, Checkpoint):
    """A training checkpoint as weights, each put together from its shards when it is read."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path / INDEX).is_file()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = self.shards = TrainingShards(path)
        self.config = {key: self.shards.index.get(key) for key in ("model", "processor")}
        check_sections(path / INDEX, self.config)
        self.provenance = read_json(path / PROVENANCE)
        require(path, self.tokenizer_file.name)

    def files(self) -> Sequence[Path]:
        names = (INDEX, *self.shards.index["files"])
        return [*tokenizer_files(self.tokenizer_file), *(self.path / name for name in names)]


FORMATS.register("training", TrainingCheckpoint)


def consolidate(
    checkpoint: Path, out: Path, dtype: torch.dtype, extra: dict[str, Any] | None = None, leave_out: Sequence[str] = ()
) -> None:
    """Write a training checkpoint as a model's folder, in place of what is there; see
    `write_checkpoint`.

    Args:
        extra: added to the provenance.
    """
    source = TrainingCheckpoint(checkpoint)
    write_checkpoint(
        out,
        source,
        model=source.config["model"],
        processor=source.processor,
        tokenizer=source.tokenizer_file,
        provenance=source.provenance | (extra or {}),
        dtype=dtype,
        overwrite=True,
        leave_out=leave_out,
    )
