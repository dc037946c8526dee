"""Named tensors that are read one at a time, or a stretch at a time, with bounded memory."""

from __future__ import annotations

import difflib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Lock
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import xxhash
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
"""The names of dtypes in safetensors files."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The properties of a stored tensor that are known without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def cast(self, dtype: torch.dtype | None) -> TensorInfo:
        """The same in `dtype`; integers keep their own, and so do all tensors if it is None."""
        return self if dtype is None or not self.dtype.is_floating_point else TensorInfo(self.shape, dtype)


# -- readers ---------------------------------------------------------------------------------------

Read = Callable[[Tensor, int], None]
"""Fills a tensor (contiguous, [n], of the stored dtype) with elements of a flattened tensor from a
place on."""

AHEAD_BYTES = 2**29
"""Bytes of the whole tensors that threads hold at once, unless a single tensor is larger."""


class _Room:
    """A bound for the bytes that several threads hold."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._held = 0

    @contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._held or self._held + nbytes <= AHEAD_BYTES)
            self._held += nbytes
        try:
            yield
        finally:
            with self._condition:
                self._held -= nbytes
                self._condition.notify_all()


_ROOM = _Room()


class TensorReader(ABC):
    """Named tensors of a file, a folder or the memory, in the order in which they are best read.

    Names are canonical (those that `Sphinx` gives its tensors) or raw (those of the files); a
    subclass says which. Several threads may read at once.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def info(self, name: str) -> TensorInfo: ...

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in the dtype in which it is stored."""

    @contextmanager
    def open(self, name: str) -> Iterator[Read]:
        """A function that reads stretches of one tensor. Several threads may each have one."""
        flat = self.tensor(name).reshape(-1)

        def read(out: Tensor, start: int) -> None:
            out.copy_(flat[start : start + len(out)])

        yield read

    def stretches(self, name: str, dtype: torch.dtype) -> Generator[Tensor, None, None]:
        """The flattened tensor in consecutive stretches of `dtype`, each valid until the next is
        asked for.

        Unless a subclass does better, the only stretch is the whole tensor. Threads wait for each
        other when they hold more than `AHEAD_BYTES`.
        """
        with _ROOM.take(self.info(name).nbytes):
            yield self.tensor(name).detach().to("cpu", dtype).flatten()


def assemble(stretches: Generator[Tensor, None, None], info: TensorInfo) -> Tensor:
    """The whole tensor of its stretches."""
    whole, end = torch.empty(info.numel, dtype=info.dtype), 0
    with closing(stretches):
        for stretch in stretches:
            whole[end : (end := end + len(stretch))] = stretch
    return whole.view(info.shape)


class TensorDict(TensorReader):
    """The tensors of a dictionary, such as a module's state."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self._tensors[name].shape), self._tensors[name].dtype)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class TensorView(TensorReader):
    """Another reader's tensors."""

    tensors: TensorReader

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return self.tensors.info(name)

    def tensor(self, name: str) -> Tensor:
        return self.tensors.tensor(name)

    @contextmanager
    def open(self, name: str) -> Iterator[Read]:
        with self.tensors.open(name) as read:
            yield read


MAPPED_BYTES = 2**29
"""Bytes read before mapped files are dropped: mapped pages count as this process's memory."""


class MappedFile(ABC):
    """Files that are mapped into memory.

    What is read through all of them together is bounded by `MAPPED_BYTES`.
    """

    _lock: ClassVar = Lock()
    _all: ClassVar[WeakSet[MappedFile]] = WeakSet()

    def __init__(self) -> None:
        self._read = 0
        with MappedFile._lock:
            MappedFile._all.add(self)

    @abstractmethod
    def _drop(self) -> None:
        """Let go of the mappings and their pages; the next access maps the files again."""

    def count(self, nbytes: int) -> None:
        """Add to the bytes that were read."""
        with MappedFile._lock:
            self._read += nbytes
            if sum(file._read for file in MappedFile._all) <= MAPPED_BYTES:
                return
            for file in MappedFile._all:
                if file._read:
                    file._drop()
                    file._read = 0


class SafetensorsFile(MappedFile, TensorReader):
    """The tensors of one safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._mapped: Any = None  # safetensors ships no types
        self._offsets: dict[str, int] | None = None
        self.keys: list[str] = self._file().offset_keys()
        """Names in the file's order, in which a pass over all tensors is one sequential read."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys)

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
        self.count(tensor.nbytes)
        return tensor

    @contextmanager
    def open(self, name: str) -> Iterator[Read]:
        """A function that reads stretches, which are not mapped: nothing but its argument takes
        memory.

        Raises:
            UserError: the file is gone or has become shorter.
        """
        begin = self._offset(name)

        def read(out: Tensor, start: int) -> None:
            rest: memoryview = out.view(-1).view(torch.uint8).numpy().data
            place = begin + start * out.itemsize
            while rest:
                if not (count := os.preadv(descriptor, [rest], place)):
                    raise UserError(f"'{self.path}' is damaged (it ends too early): copy the checkpoint again")
                rest, place = rest[count:], place + count

        try:
            # Opened each time, since there can be more files than a process may have open.
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


class SafetensorsFiles(TensorReader):
    """The tensors of several safetensors files in one folder.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.files = {name: SafetensorsFile(folder / name) for name in names}
        self._file_of = {key: file for file in self.files.values() for key in file}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def info(self, name: str) -> TensorInfo:
        return self._file_of[name].info(name)

    def tensor(self, name: str) -> Tensor:
        return self._file_of[name].tensor(name)

    @contextmanager
    def open(self, name: str) -> Iterator[Read]:
        with self._file_of[name].open(name) as read:
            yield read

    def file(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor."""
        return self._file_of[name]


# -- whole models ----------------------------------------------------------------------------------

ENCODER_PREFIX = "mixer.towers."
"""The prefix of the names of the encoders' tensors."""


def encoder_of(name: str) -> str:
    """Return the key of the encoder that a tensor belongs to, or "" for the rest of the model."""
    return name.removeprefix(ENCODER_PREFIX).split(".")[0] if name.startswith(ENCODER_PREFIX) else ""


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `tensors` over those of the same name in `target` (a state dict), one by one."""
    for name, tensor in tensors:
        target[name].copy_(tensor)


def compare(wanted: Mapping[str, tuple[int, ...]], present: Mapping[str, tuple[int, ...]]) -> str:
    """The difference between two models' tensors, naming the first few; "" if there is none."""
    missing = [name for name in wanted if name not in present]
    extra = [name for name in present if name not in wanted]
    misshaped = [name for name in wanted if name in present and wanted[name] != present[name]]

    def near(name: str, candidates: list[str]) -> str:
        matches = difflib.get_close_matches(name, candidates[:1000], n=1, cutoff=0.8)
        return f"'{name}' (it has '{matches[0]}')" if matches else f"'{name}'"

    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: " + ", ".join(near(name, extra) for name in missing[:3]))
    if extra:
        parts.append(f"{len(extra)} unexpected: " + ", ".join(repr(name) for name in extra[:3]))
    if misshaped:
        shapes = (f"'{name}' is {list(present[name])} instead of {list(wanted[name])}" for name in misshaped[:3])
        parts.append(f"{len(misshaped)} of another shape: " + ", ".join(shapes))
    return "; ".join(parts)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by their bytes."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether shape, dtype and every bit are equal: 0 differs from -0, and NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = _INTEGERS.get(a.itemsize, torch.uint8)
    return torch.equal(a.contiguous().view(-1).view(kind), b.contiguous().view(-1).view(kind))


def hash_of_hashes(reader: TensorReader, hashes: Mapping[str, str]) -> str:
    """One hash of all tensors, made of theirs: the same however they are spread over files.

    XXH3 with 128 bits is as fast as memory. It tells one model from another, not a forgery from the
    original.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(reader):
        info = reader.info(name)
        digest.update(f"{name} {info.dtype} {list(info.shape)} {hashes[name]}\n".encode())
    return digest.hexdigest()


def content_hash(reader: TensorReader, chunk: int = 1 << 20) -> str:
    """`hash_of_hashes` of all values, which are read for it."""
    return hash_of_hashes(reader, {name: tensor_hash(reader, name, chunk) for name in reader})


def tensor_hash(reader: TensorReader, name: str, chunk: int = 1 << 20) -> str:
    """The hash of one tensor's bytes, read `chunk` elements at a time."""
    info, digest = reader.info(name), xxhash.xxh3_128()
    with reader.open(name) as read:
        for start in range(0, info.numel, chunk):
            stretch = torch.empty(min(chunk, info.numel - start), dtype=info.dtype)
            read(stretch, start)
            digest.update(stretch.view(torch.uint8).numpy().data)
    return digest.hexdigest()
