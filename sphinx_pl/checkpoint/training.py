"""Checkpoints that a run goes on from: what every rank holds, in pieces, readable by any number of ranks.

    training.json                       shapes, files and their sizes, model and prompt format
    pieces-00000-of-00002.safetensors   of one rank: flat pieces of weights and of optimizer states
    state.pt                            loops, schedule, callbacks, data position: tensors and plain values, no pickled code
    tokenizer.model, provenance.json    as beside every model

A piece is a stretch of a flattened tensor: all of it where a process holds whole tensors, a rank's partition under
ZeRO-3, some rows under FSDP2. Which engine wrote it does not matter to who reads it. Weights are those that the optimizer
works on (float32 masters where there are any), so the folder is also a checkpoint like any other: `open_checkpoint`
reads it a tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.checkpoint.format import (
    FORMATS,
    PROVENANCE,
    TOKENIZER,
    Checkpoint,
    SafetensorsFile,
    TensorInfo,
    read_json,
    sync,
    write_json,
    write_safetensors,
)
from sphinx_pl.errors import UserError

FORMAT_VERSION = 1
INDEX = "training.json"
STATE = "state.pt"
WEIGHT = "weight"
"""Kind of the pieces of weights; the other kinds are the optimizer's names of its states."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`values` are elements `start`, `start + 1`, ... of the flattened tensor `kind` of the parameter `name`."""

    kind: str
    name: str
    start: int
    values: Tensor  # [n], on any device


def file_name(rank: int, ranks: int) -> str:
    return f"pieces-{rank:05d}-of-{ranks:05d}.safetensors"


def write_pieces(folder: Path, rank: int, ranks: int, pieces: Iterable[Piece]) -> None:
    """This rank's file, a piece at a time, and on the disk when this returns."""
    held = {f"{piece.kind}/{piece.name}": piece for piece in pieces}
    infos = {key: TensorInfo(tuple(piece.values.shape), piece.values.dtype) for key, piece in held.items()}
    starts = json.dumps({key: piece.start for key, piece in held.items() if piece.start})
    file = folder / file_name(rank, ranks)
    write_safetensors(file, infos, lambda key: held[key].values, metadata={"starts": starts})
    sync(file)


def write_rest(folder: Path, ranks: int, shapes: Mapping[str, Sequence[int]], state: Mapping[str, Any]) -> None:
    """What one rank writes when all pieces are there. `describe` completes the folder.

    Args:
        shapes: of every tensor of the model.
        state: everything that is no piece.
    """
    torch.save(dict(state), folder / STATE)
    names = [file_name(rank, ranks) for rank in range(ranks) if (folder / file_name(rank, ranks)).exists()]
    files = {name: (folder / name).stat().st_size for name in [*names, STATE]}
    shapes = {name: list(shape) for name, shape in shapes.items()}
    write_json(folder / INDEX, {"format": FORMAT_VERSION, "ranks": ranks, "files": files, "shapes": shapes})


class Pieces:
    """The tensors of a training checkpoint, of which any stretch can be read.

    Raises:
        UserError: a file is missing, cut short, or of a version that this code does not know.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_json(folder / INDEX)
        if self.index.get("format") != FORMAT_VERSION:
            raise UserError(
                f"'{folder / INDEX}' has format {self.index.get('format')!r} but this version reads {FORMAT_VERSION}: "
                "go on with the version of sphinx_pl that wrote it, or start from its weights (stage.init_from)"
            )
        try:
            self.ranks = int(self.index["ranks"])
            self.shapes = {str(name): tuple(int(n) for n in shape) for name, shape in self.index["shapes"].items()}
            sizes = {str(name): int(size) for name, size in self.index["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"'{folder / INDEX}' is damaged ({error!r}): use another checkpoint of the run") from None
        for name, size in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else -1
            if Path(name).name != name or found != size:
                what = "is missing" if found < 0 else f"has {found:,} bytes instead of {size:,}"
                raise UserError(f"'{folder / name}' {what}: use another checkpoint of the run")
        self._names = [file_name(rank, self.ranks) for rank in range(self.ranks)]
        self._names = [name for name in self._names if name in sizes]
        self._open: dict[str, tuple[SafetensorsFile, dict[str, tuple[int, int, torch.dtype]]]] = {}

    def numel(self, name: str) -> int:
        return torch.Size(self.shapes[name]).numel()

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """Raises: UserError: no file has a piece of it."""
        for file in self._near(0, 1):
            if found := self._held(file)[1].get(f"{kind}/{name}"):
                return found[2]
        raise UserError(f"'{self.folder}' lacks {kind} of '{name}': use another checkpoint of the run")

    def kinds(self) -> list[str]:
        """Kinds of optimizer states that there are."""
        found = {key.split("/", 1)[0] for file in self._names for key in self._held(file)[1]}
        return sorted(found - {WEIGHT})

    def has(self, name: str, kind: str) -> bool:
        return any(f"{kind}/{name}" in self._held(file)[1] for file in self._near(0, 1))

    def read(self, name: str, start: int = 0, stop: int | None = None, kind: str = WEIGHT) -> Tensor:
        """Elements [start, stop) of the flattened tensor. Only these bytes are read.

        Raises:
            UserError: some of them are in no file.
        """
        numel = self.numel(name)
        stop = numel if stop is None else stop
        if stop <= start:
            return torch.empty(0, dtype=self.dtype(name, kind))
        out: Tensor | None = None
        missing = stop - start
        for file in self._near(start, numel):
            opened, held = self._held(file)
            if (found := held.get(f"{kind}/{name}")) is None:
                continue
            first, count, dtype = found
            a, b = max(start, first), min(stop, first + count)
            if a >= b:
                continue
            part = opened.part(f"{kind}/{name}", a - first, b - first)
            if b - a == stop - start:
                return part
            out = torch.empty(stop - start, dtype=dtype) if out is None else out
            out[a - start : b - start] = part
            missing -= b - a
            if not missing:
                return out
        raise UserError(f"'{self.folder}' lacks a part of {kind} of '{name}': use another checkpoint of the run")

    def _near(self, start: int, numel: int) -> Iterator[str]:
        """All files, those first that should hold this place: a rank that goes on opens little else than its own."""
        guess = min(len(self._names) - 1, start * len(self._names) // max(numel, 1))
        order = sorted(range(len(self._names)), key=lambda i: (abs(i - guess), i))
        return (self._names[i] for i in order)

    def _held(self, file: str) -> tuple[SafetensorsFile, dict[str, tuple[int, int, torch.dtype]]]:
        """The file, and by key where its piece begins, how long it is and its dtype."""
        if file not in self._open:
            opened = SafetensorsFile(self.folder / file)
            try:
                starts = json.loads(opened.metadata().get("starts", "{}"))
                held = {key: (int(starts.get(key, 0)), opened.info(key)) for key in opened.keys}
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"'{opened.path}' is damaged ({error}): use another checkpoint of the run") from None
            self._open[file] = opened, {key: (start, info.numel, info.dtype) for key, (start, info) in held.items()}
        return self._open[file]

    def state(self) -> dict[str, Any]:
        """What `write_rest` was given. Only tensors and plain values are unpickled."""
        try:
            state: dict[str, Any] = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or foreign file makes torch raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"'{self.folder / STATE}' cannot be read ({reason}): use another checkpoint") from None
        return state


def describe(
    folder: Path,
    model: dict[str, Any],
    processor: dict[str, Any],
    tokenizer_file: Path,
    provenance: dict[str, Any],
) -> None:
    """Add what makes the folder a checkpoint of a model: see `write_checkpoint` for the arguments."""
    (folder / TOKENIZER).write_bytes(tokenizer_file.read_bytes())
    write_json(folder / PROVENANCE, provenance)
    write_json(folder / INDEX, read_json(folder / INDEX) | {"model": model, "processor": processor})


class TrainingCheckpoint(Checkpoint):
    """A training checkpoint as weights, each put together from its pieces when it is read."""

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path / INDEX).is_file()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pieces = Pieces(path)
        self.config = {key: self.pieces.index.get(key) for key in ("model", "processor")}
        if not all(isinstance(section, dict) for section in self.config.values()):
            raise UserError(f"'{path / INDEX}' lacks the model's configuration: use another checkpoint of the run")
        self.provenance = read_json(path / PROVENANCE)

    def keys(self) -> Sequence[str]:
        return list(self.pieces.shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.pieces.shapes[name], self.pieces.dtype(name))

    def tensor(self, name: str) -> Tensor:
        return self.pieces.read(name).view(self.pieces.shapes[name])

    def files(self) -> Sequence[Path]:
        return [self.path / name for name in (INDEX, TOKENIZER, *self.pieces.index["files"])]

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER


FORMATS.register("training", TrainingCheckpoint)
