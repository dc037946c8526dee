"""The writer of model folders: whole or not there, in several threads, and resumed after a kill.

Each file first gets room for all its values, so that threads write tensors where they belong. Files
that are complete are kept if the process is killed: the same command continues behind them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from sphinx_pl.checkpoints.folder import check_room, linked, move_into_place, read_json, sync, unfinished
from sphinx_pl.checkpoints.output import Entry, OutputFile, OutputFolder
from sphinx_pl.checkpoints.tensors import TensorInfo, TensorReader, assemble
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_folder, write_whole

log = logging.getLogger(__name__)

PROGRESS_BYTES = 2**24
"""How often the progress bar is updated, which takes longer than writing a stretch."""

JOURNAL = ".journal"
"""Folder in the temporary one: the fingerprint of what is being written, and the facts of each
complete file."""

Written = Callable[[int], None]
"""Is told how many bytes were written."""


class CheckpointWriter:
    """Writes a model's folder, which is not there before all of it is.

    Args:
        files: what the folder holds.
        fingerprint: identifies the content, as JSON: complete files of a killed run are kept if
            theirs is the same. None: nothing is kept.
        workers: threads; each writes one tensor at a time.
        progress: a word for the progress bar; None shows none.
        overwrite: replace what is there.
    """

    def __init__(
        self,
        out: Path,
        files: OutputFolder,
        *,
        fingerprint: Any = None,
        workers: int = 1,
        progress: str | None = None,
        overwrite: bool = False,
    ) -> None:
        self.out = linked(out)
        self.files = files
        self.fingerprint = fingerprint
        self.workers = workers
        self.progress = progress
        self.overwrite = overwrite
        self._folder = unfinished(self.out)
        self._journal = self._folder / JOURNAL

    def check(self) -> None:
        """Whether the folder can be made and the disk has room: asked before what takes long. Makes
        nothing.

        Raises:
            UserError: it cannot, or has not. What a killed run has left may need less, and is not
                looked at.
        """
        check_folder(self._folder, "out")
        if not self._folder.exists():
            check_room(self.out, self.files.nbytes)

    def write(
        self,
        reader: TensorReader,
        facts: Callable[[str], Any] = lambda name: None,
        finish: Callable[[Path, dict[str, Any]], None] = lambda folder, facts: None,
    ) -> None:
        """Write the folder with the reader's values.

        Args:
            facts: what is to be known of a tensor once it was written, as JSON. It outlives a kill.
            finish: called with the folder and the facts of all tensors by name, when all files are
                there.

        Raises:
            UserError: no folder can be made there or another one is there, another process writes
                the same one, the disk is too small or full or fails (complete files are kept then),
                or what `reader` raises (nothing is kept).
        """
        self.check()
        with self._locked():
            if self.out.exists() and not self.overwrite:  # perhaps made by the process that had the lock
                shutil.rmtree(self._folder)
                raise UserError(f"'{self.out}' exists: choose another path")
            complete = self._begin()
            todo = [file for file in self.files.files if file.name not in complete]
            try:
                check_room(self.out, sum(file.nbytes for file in todo))
            except UserError:
                if not complete:
                    shutil.rmtree(self._folder)
                raise
            try:
                with progress_bar(self.progress, self.files.nbytes) as written:
                    written(self.files.nbytes - sum(file.nbytes for file in todo))
                    self._fill(todo, reader, facts, complete, written)
                self.files.finish(self._folder)
                finish(self._folder, {n: fact for file in self.files.files for n, fact in complete[file.name].items()})
                shutil.rmtree(self._journal)
                sync(*self._folder.iterdir(), self._folder)
            except OSError as error:
                self._remove_unless_resumable()
                raise self._failure(error) from error
            except Exception:
                shutil.rmtree(self._folder, ignore_errors=True)
                raise
            except BaseException:  # Ctrl-C
                self._remove_unless_resumable()
                raise
            move_into_place(self._folder, self.out, self.overwrite)

    def _remove_unless_resumable(self) -> None:
        if self.fingerprint is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _failure(self, error: OSError) -> UserError:
        """One line for an error of a disk."""
        remedy = "run the command again"
        if self.fingerprint is not None:
            remedy += ", which continues behind the files that are complete"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(f"the disk of '{self.out}' is full: free some space and {remedy}")
        if error.filename is not None and not Path(error.filename).is_relative_to(self._folder):
            return UserError(f"'{error.filename}' cannot be read ({error.strerror}): repair it and {remedy}")
        return UserError(f"'{self.out}' is not finished ({error}): check the disk and {remedy}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one process at a time writes a folder."""
        while (descriptor := _lock(self._folder)) is None:
            pass
        try:
            yield
        finally:
            os.close(descriptor)

    def _begin(self) -> dict[str, dict[str, Any]]:
        """Empty the folder but for complete files; returns their facts by file name."""
        plan, fingerprint = self._journal / "plan.json", json.dumps(self.fingerprint, sort_keys=True)
        complete: dict[str, dict[str, Any]] = {}
        if self.fingerprint is not None and plan.is_file() and plan.read_text(encoding="utf-8") == fingerprint:
            for file in self.files.files:
                note = self._journal / f"{file.name}.json"
                if note.is_file() and (self._folder / file.name).is_file():
                    complete[file.name] = read_json(note)
        for path in self._folder.iterdir():
            if path.name != JOURNAL and path.name not in complete:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not complete:
            shutil.rmtree(self._journal, ignore_errors=True)
        self._journal.mkdir(exist_ok=True)
        write_whole(plan, fingerprint)
        if complete:
            log.info("%d of %d files are complete already", len(complete), len(self.files.files))
        return complete

    def _fill(
        self,
        files: list[OutputFile],
        reader: TensorReader,
        facts: Callable[[str], Any],
        complete: dict[str, dict[str, Any]],
        written: Written,
    ) -> None:
        """Make the files; `complete` gets the facts of each.

        Threads begin the next file while one of them ends the last tensor of a file. Files of few,
        large tensors come first, so that no thread is left with one at the very end.
        """
        filling: deque[_Filling] = deque()
        closing_jobs: list[Future[None]] = []
        over = Event()

        def end() -> None:
            file = filling.popleft()
            file.end()
            names = (entry.name for entry in file.output.entries.values() if entry.name is not None)
            complete[file.output.name] = {name: facts(name) for name in names}
            closing_jobs.append(closer.submit(self._close, file.output.name, complete[file.output.name]))

        with ThreadPoolExecutor(3) as closer, ThreadPoolExecutor(self.workers) as pool:
            try:
                for file in sorted(files, key=lambda file: -file.nbytes / max(1, len(file.entries))):
                    try:
                        filling.append(_Filling(self._folder, file, reader, pool, closer, written, over))
                    except OSError:  # no room for it: what was begun is ended, and kept
                        while filling:
                            end()
                        _wait(closing_jobs)
                        raise
                    if len(filling) == 2:
                        end()
                    _wait([job for job in closing_jobs if job.done()])
                while filling:
                    end()
            except BaseException:  # or Ctrl-C
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                over.set()
            _wait(closing_jobs)

    def _close(self, name: str, facts: dict[str, Any]) -> None:
        """Give a filled file its name, and note it as complete."""
        sync(self._folder / f"{name}.part")
        (self._folder / f"{name}.part").rename(self._folder / name)
        write_whole(self._journal / f"{name}.json", json.dumps(facts))


class _Filling:
    """A file whose tensors are being written by `pool`, while `closer` has them go to the disk."""

    def __init__(
        self,
        folder: Path,
        output: OutputFile,
        reader: TensorReader,
        pool: ThreadPoolExecutor,
        closer: ThreadPoolExecutor,
        written: Written,
        over: Event,
    ) -> None:
        self.output = output
        partial = folder / f"{output.name}.part"
        offsets = output.create(partial)
        self._file, self._finished = partial.open("r+b", buffering=0), Event()
        self._jobs = _submit(pool, self._file.fileno(), output, offsets, reader, written)
        self._flushing = closer.submit(_flush, self._file.fileno(), self._finished, over)

    def end(self) -> None:
        """Wait for the tensors. The file is synced beside the next ones, since a disk is slower
        than the page cache.

        Raises what writing a tensor does, and OSError if the disk did not take all.
        """
        _wait(self._jobs)
        self._finished.set()
        self._flushing.result()
        self._file.close()


def write_file(path: Path, output: OutputFile, reader: TensorReader) -> None:
    """Write one file; a tensor is in memory at a time, of small ones two."""
    offsets = output.create(path)
    with path.open("r+b", buffering=0) as file, ThreadPoolExecutor(2) as pool:
        try:
            _wait(_submit(pool, file.fileno(), output, offsets, reader, lambda nbytes: None))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def progress_bar(description: str | None, total: int) -> Iterator[Written]:
    """A bar with bytes per second and the time left, and a function that moves it, or None."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=description is None) as bar:
        task = bar.add_task(description or "", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock;
    None if the process that had it took the folder away meanwhile."""
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
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        return descriptor  # some clusters' file systems have no locks
    os.close(descriptor)
    return None


def _flush(descriptor: int, *ends: Event) -> None:
    """Have what is written go to the disk meanwhile, so that little of it is left at the end.

    Raises OSError, which the system reports only once.
    """
    while not any(end.is_set() for end in ends):
        os.fdatasync(descriptor)
        ends[0].wait(0.1)


def _wait(jobs: list[Future[None]]) -> None:
    """Wait until all are done, or raise what the first one that failed did."""
    for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
        job.result()


def _submit(
    pool: ThreadPoolExecutor,
    descriptor: int,
    output: OutputFile,
    offsets: dict[str, int],
    reader: TensorReader,
    written: Written,
) -> list[Future[None]]:
    """A job for each tensor of a file."""
    return [
        pool.submit(_write, descriptor, offsets[name], name, entry, reader, written)
        for name, entry in output.entries.items()
    ]


def _write(descriptor: int, offset: int, name: str, entry: Entry, reader: TensorReader, written: Written) -> None:
    """Write one tensor."""
    end = offset + entry.info.nbytes
    unreported = 0
    with closing(_values(entry, reader)) as stretches:  # other threads may wait for the room that it holds
        for stretch in stretches:
            data: memoryview = stretch.contiguous().view(torch.uint8).numpy().data
            unreported += len(data)
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
            if unreported >= PROGRESS_BYTES or offset == end:
                written(unreported)
                unreported = 0
    if offset != end:
        raise ValueError(f"'{name}' has {offset - end} bytes more than announced")


def _values(entry: Entry, reader: TensorReader) -> Generator[Tensor, None, None]:
    """The flattened tensor of an entry in stretches."""
    dtype = entry.info.dtype
    if entry.name is not None and entry.make is None:
        yield from reader.stretches(entry.name, dtype)
        return
    assert entry.make is not None
    whole = (
        [] if entry.name is None else [assemble(reader.stretches(entry.name, dtype), TensorInfo(entry.shape, dtype))]
    )
    yield entry.make(*whole).to(dtype).flatten()
