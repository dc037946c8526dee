"""The files of a model as they are to be written, apart from what is written into them.

A `Layout` names files and, for each tensor in them, which tensor of the source it is made of; `write_layout` makes the
files, each with room for all its values first, so that several threads fill in tensors where they belong. Files that
are complete are kept if the process is killed: the same command goes on behind them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from sphinx_pl.checkpoints.folder import (
    INDEX,
    check_room,
    linked,
    move_into_place,
    read_json,
    sync,
    unfinished,
    write_json,
)
from sphinx_pl.checkpoints.format import MAX_SHARD_BYTES, into_shards, progress_bar, safetensors_header, shard_names
from sphinx_pl.checkpoints.tensors import TensorInfo
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_folder, write_whole

log = logging.getLogger(__name__)

SAID_BYTES = 2**24
"""How often the progress bar is told: telling it takes longer than writing a stretch."""

JOURNAL = ".journal"
"""Folder in the temporary one: the fingerprint of what is being written, and what is known of each complete file."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: shape and dtype there, the source's key, and how it is made of the source's tensor.

    `make` is None where it is that tensor as it is; else it is given it whole, in `shape`. Without a key it is called
    with nothing: the source knows nothing of the tensor.
    """

    info: TensorInfo
    key: str | None
    make: Callable[..., Tensor] | None = None
    shape: tuple[int, ...] = ()


class OutFile(ABC):
    """A file with room for named tensors."""

    def __init__(self, name: str, entries: Mapping[str, Entry]) -> None:
        self.name = name
        self.entries = dict(entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.info.nbytes for entry in self.entries.values())

    @abstractmethod
    def create(self, path: Path) -> dict[str, int]:
        """Make the file without values, in its full length; returns where each tensor's values begin."""


class SafetensorsOut(OutFile):
    def create(self, path: Path) -> dict[str, int]:
        header, offsets = safetensors_header({name: entry.info for name, entry in self.entries.items()})
        path.write_bytes(header)
        _reserve(path, len(header) + self.nbytes)
        return offsets


class TorchOut(OutFile):
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
    """Blocks for the whole file: a disk that is too small says so now."""
    with path.open("r+b") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)


@dataclass(frozen=True)
class Layout:
    """A model's folder: the files of its weights, and what writes everything else into it."""

    files: list[OutFile]
    finish: Callable[[Path], None] = field(default=lambda folder: None)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def keys(self) -> set[str]:
        """Of the source's tensors that files are made of."""
        return {entry.key for file in self.files for entry in file.entries.values() if entry.key is not None}


def safetensors_layout(
    entries: Mapping[str, Entry], finish: Callable[[Path], None], max_bytes: int = MAX_SHARD_BYTES
) -> Layout:
    """Shards of at most `max_bytes` (unless a single tensor has more) and their index, as Hugging Face's."""
    shards = into_shards({name: entry.info for name, entry in entries.items()}, max_bytes)
    files: list[OutFile] = [
        SafetensorsOut(file, {name: entries[name] for name in names})
        for file, names in zip(shard_names(len(shards)), shards, strict=True)
    ]

    def whole(folder: Path) -> None:
        write_index(folder, files)
        finish(folder)

    return Layout(files, whole)


def write_index(folder: Path, files: list[OutFile]) -> None:
    """Which file has which tensor, as Hugging Face writes it."""
    weight_map = {name: file.name for file in files for name in file.entries}
    write_json(
        folder / INDEX, {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weight_map}
    )


class Values(Protocol):
    """What files are filled with."""

    def stretches(self, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The flattened tensor `key` in consecutive pieces of that dtype. Called by several threads."""

    def facts(self, key: str) -> Any:
        """What is to be known of a tensor once it was written, as JSON. It outlives a kill."""


def assemble(stretches: Iterator[Tensor], info: TensorInfo) -> Tensor:
    """The whole tensor of its stretches."""
    whole, end = torch.empty(info.numel, dtype=info.dtype), 0
    for stretch in stretches:
        whole[end : (end := end + len(stretch))] = stretch
    return whole.view(info.shape)


class Whole:
    """`Values` that are made a whole tensor at a time by a function of the key."""

    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        self.tensor = tensor

    def stretches(self, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
        yield self.tensor(key).detach().to(dtype).flatten()

    def facts(self, key: str) -> Any:
        return None


def check_start(out: Path, layout: Layout) -> None:
    """Whether the folder can be made and the disk has room: asked before what takes long. Makes nothing.

    Raises:
        UserError: it cannot, or has not. What is there of a run that was killed may need less, and is not looked at.
    """
    folder = unfinished(linked(out))
    check_folder(folder, "out")
    if not folder.exists():
        check_room(out, layout.nbytes)


def write_layout(
    out: Path,
    layout: Layout,
    values: Values,
    fingerprint: Any = None,
    workers: int = 1,
    progress: str | None = None,
    finish: Callable[[Path, dict[str, Any]], None] = lambda folder, facts: None,
    overwrite: bool = False,
) -> None:
    """Write the folder `out`, which is not there before all of it is.

    Args:
        fingerprint: of what is written, as JSON: complete files of a run that was killed are taken over if theirs is
            the same. None: there is nothing to take over.
        workers: threads; each fills in one tensor at a time.
        progress: a word for the progress bar; None shows none.
        finish: called with the folder and the facts of all tensors by their key, when all files are there.
        overwrite: replace what is there.

    Raises:
        UserError: no folder can be made there or another one is there, another process writes the same one, the disk
            is too small or full or fails (complete files are kept then), or what `values` raises (nothing is kept).
    """
    check_start(out, layout)
    out = linked(out)
    folder = unfinished(out)
    with _locked(folder):
        if out.exists() and not overwrite:  # perhaps made by the process that had the lock
            shutil.rmtree(folder)
            raise UserError(f"'{out}' exists: choose another path")
        facts = _begin(folder, layout, fingerprint)
        todo = [file for file in layout.files if file.name not in facts]
        try:
            check_room(out, sum(file.nbytes for file in todo))
        except UserError:
            if not facts:
                shutil.rmtree(folder)
            raise
        try:
            with progress_bar(progress, layout.nbytes) as written:
                written(layout.nbytes - sum(file.nbytes for file in todo))
                _fill(folder, todo, values, workers, written, facts)
            layout.finish(folder)
            finish(folder, {key: fact for file in layout.files for key, fact in facts[file.name].items()})
            shutil.rmtree(folder / JOURNAL)
            sync(*folder.iterdir(), folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the disk of '{out}' is full: free some space and run the command again, which goes on from there"
                ) from error
            if error.filename is not None and not Path(error.filename).is_relative_to(folder):
                what = f"'{error.filename}' cannot be read ({error.strerror}): mend that"
            else:
                what = f"'{out}' is not finished ({error}): check the disk"
            raise UserError(f"{what} and run the command again, which goes on from there") from error
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        move_into_place(folder, out, overwrite)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time writes a folder."""
    while (descriptor := _lock(folder)) is None:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock; None if whoever had it took the folder away before we came to it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is writing '{folder}': wait for it, or choose another path") from None
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def _begin(folder: Path, layout: Layout, fingerprint: Any) -> dict[str, dict[str, Any]]:
    """Empty the folder but for files that are complete; returns their facts by file name."""
    journal, said = folder / JOURNAL, json.dumps(fingerprint, sort_keys=True)
    kept: dict[str, dict[str, Any]] = {}
    plan = journal / "plan.json"
    if fingerprint is not None and plan.is_file() and plan.read_text(encoding="utf-8") == said:
        for file in layout.files:
            note = journal / f"{file.name}.json"
            if note.is_file() and (folder / file.name).is_file():
                kept[file.name] = read_json(note)
    for path in folder.iterdir():
        if path.name != JOURNAL and path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not kept:
        shutil.rmtree(journal, ignore_errors=True)
    journal.mkdir(exist_ok=True)
    write_whole(plan, said)
    if kept:
        log.info("%d of %d files are complete already", len(kept), len(layout.files))
    return kept


def _fill(
    folder: Path,
    files: list[OutFile],
    values: Values,
    workers: int,
    written: Callable[[int], None],
    facts: dict[str, dict[str, Any]],
) -> None:
    """Make the files; `facts` gets those of each that is complete.

    Threads go on with the next file while one of them ends the last tensor of a file. Files of few, large tensors come
    first, so that no thread is left with one at the very end.
    """
    filling: deque[_Filling] = deque()
    closing: list[Future[None]] = []
    over = Event()

    def end() -> None:
        filled = filling.popleft()
        facts[filled.name] = filled.end(values)
        closing.append(closer.submit(_close, folder, filled.name, facts[filled.name]))

    with ThreadPoolExecutor(3) as closer, ThreadPoolExecutor(workers) as pool:
        try:
            for file in sorted(files, key=lambda file: -file.nbytes / max(1, len(file.entries))):
                try:
                    filling.append(_Filling(folder, file, values, pool, closer, written, over))
                except OSError:  # no room for it: what was begun is ended, and kept
                    while filling:
                        end()
                    _result(closing)
                    raise
                if len(filling) == 2:
                    end()
                _result([job for job in closing if job.done()])
            while filling:
                end()
        except BaseException:  # or Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            over.set()
        _result(closing)


class _Filling:
    """A file whose tensors are being filled in, by `pool`, while `closer` has what is written go to the disk."""

    def __init__(
        self,
        folder: Path,
        file: OutFile,
        values: Values,
        pool: ThreadPoolExecutor,
        closer: ThreadPoolExecutor,
        written: Callable[[int], None],
        over: Event,
    ) -> None:
        self.name = file.name
        self._keys = [entry.key for entry in file.entries.values() if entry.key is not None]
        partial = folder / f"{file.name}.part"
        offsets = file.create(partial)
        self._file, self._finished = partial.open("r+b", buffering=0), Event()
        self._jobs = [
            pool.submit(_write, self._file.fileno(), offsets[name], entry, values, written)
            for name, entry in file.entries.items()
        ]
        self._flushing = closer.submit(_flush, self._file.fileno(), self._finished, over)

    def end(self, values: Values) -> dict[str, Any]:
        """Wait for the tensors; returns their facts. What is left is closed beside the next files, since a disk takes
        longer than the page cache.

        Raises what filling in a tensor does, and OSError if the disk did not take all.
        """
        _result(self._jobs)
        self._finished.set()
        self._flushing.result()
        self._file.close()
        return {key: values.facts(key) for key in self._keys}


def _flush(descriptor: int, *ends: Event) -> None:
    """Have what is written go to the disk meanwhile, so that little of it is left at the end.

    Raises OSError, which is not said again to who opens the file anew.
    """
    while not any(end.is_set() for end in ends):
        os.fdatasync(descriptor)
        ends[0].wait(0.1)


def _result(jobs: list[Future[None]]) -> None:
    """Wait until all are done, or raise what the first one that failed did."""
    for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
        job.result()


def _close(folder: Path, name: str, facts: dict[str, Any]) -> None:
    sync(folder / f"{name}.part")
    (folder / f"{name}.part").rename(folder / name)
    write_whole(folder / JOURNAL / f"{name}.json", json.dumps(facts))


def _write(descriptor: int, offset: int, entry: Entry, values: Values, written: Callable[[int], None]) -> None:
    """Fill in one tensor."""
    dtype = entry.info.dtype
    stretches = values.stretches(entry.key, dtype) if entry.key is not None else iter(())
    if entry.make is not None:
        whole = () if entry.key is None else (assemble(stretches, TensorInfo(entry.shape, dtype)),)
        stretches = iter([entry.make(*whole).to(dtype).flatten()])
    end = offset + entry.info.nbytes
    unsaid = 0
    for stretch in stretches:
        data: memoryview = stretch.contiguous().view(torch.uint8).numpy().data
        unsaid += len(data)
        while data:
            count = os.pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count
        if unsaid >= SAID_BYTES or offset == end:
            written(unsaid)
            unsaid = 0
    if offset != end:
        raise ValueError(f"'{entry.key}' has {offset - end} bytes more than announced")


def write_parallel(
    file: Path, tensors: Mapping[str, TensorInfo], values: Callable[[str], Tensor], wrap: str | None = None
) -> None:
    """Write one file of `torch.save`, `{wrap: {name: tensor}}` or without `wrap` the tensors alone, a tensor at a time.

    Args:
        values: name -> value; asked once for each name, in their order.
    """
    out = TorchOut(file.name, {name: Entry(info, name) for name, info in tensors.items()}, wrap)
    offsets = out.create(file)
    descriptor = os.open(file, os.O_WRONLY)
    try:
        for name, entry in out.entries.items():
            _write(descriptor, offsets[name], entry, Whole(values), lambda nbytes: None)
    finally:
        os.close(descriptor)
