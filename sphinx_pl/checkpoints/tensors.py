"""Named tensors, read one at a time with bounded memory."""

from __future__ import annotations

import difflib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_pointer

DTYPES = {
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours comes from: names in their files, and how their values make it."""

    names: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor

    def shape(self, found: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Of what `make` gives, from the shapes of `names`; the first of them where they do not fit together."""
        try:
            return tuple(self.make(*(torch.empty(shape, device="meta") for shape in found)).shape)
        except (RuntimeError, IndexError):
            return tuple(found[0])


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
        if view.get_dtype() not in DTYPES:
            raise UserError(
                f"'{self.path}': '{name}' is stored as {view.get_dtype()}, which this project does not read"
            )
        return TensorInfo(tuple(view.get_shape()), DTYPES[view.get_dtype()])

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


TOWERS = "mixer.towers."
"""Of the names of the towers' tensors."""


def tower_of(name: str) -> str:
    """Key of the tower that a tensor belongs to; "" for the rest of the model."""
    return name.removeprefix(TOWERS).split(".")[0] if name.startswith(TOWERS) else ""
