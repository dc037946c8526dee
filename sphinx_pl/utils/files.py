"""Files that are whole or not there, and what tells one from another."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.filesize import decimal

from sphinx_pl.utils.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed to it at the end: a kill leaves the old file, or none.

    After an exception the temporary file is deleted.
    """
    # A name of its own, since ranks and threads may write the same file at once: the last one stays.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident():x}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a whole file. Text is UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def replaced(path: Path) -> Path:
    """What a folder is called from when another one takes its place until it is deleted."""
    return path.with_name(f".{path.name}.replaced.tmp")


def discard(path: Path) -> None:
    """Delete a folder. It loses its name first: what is half deleted when a run is killed is no checkpoint."""
    if not path.exists():
        return
    gone = replaced(path)
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def finite(content: Any) -> Any:
    """With null for every number that is NaN or infinite: JSON has no word for them, and other programs refuse ours."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def make_folder(path: Path, key: str) -> None:
    """Raises: UserError: there can be none; `key` is what the user gave it as."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{key}: '{path}' cannot be a folder ({error.strerror or error}): choose another path"
        ) from None


def check_folder(path: Path, key: str) -> None:
    """Whether a folder can be made there: asked before what takes long. Makes nothing.

    Raises:
        UserError: it cannot; `key` is what the user gave it as.
    """
    try:
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        with TemporaryDirectory(prefix=".", dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{key}: '{path}' cannot be a folder ({error.strerror or error}): choose another path"
        ) from None


def check_writable(path: Path, key: str) -> None:
    """Whether a file can be written there: asked before what takes long. Makes its folder.

    Raises:
        UserError: it cannot; `key` is what the user gave it as.
    """
    make_folder(path.absolute().parent, key)
    if path.is_dir():
        raise UserError(f"{key}: '{path}' is a folder: name a file in it")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{key}: '{path}' cannot be written: choose another path")


_POINTER = b"version https://git-lfs"


def check_pointer(path: Path) -> None:
    """Raises: UserError: the file is a Git LFS pointer, which names a file that was not fetched."""
    if not path.is_file() or path.stat().st_size > 1024:
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"'{path}' is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download it"
            )


def check_disks(needs: Iterable[tuple[Path, int, int]], freed: Iterable[Path], instead: str) -> None:
    """Whether disks have room for what a run is going to write.

    Args:
        needs: of each folder, the bytes that it holds at most, and those that are written before anything is deleted.
        freed: files and folders that are deleted while the run writes.
        instead: what helps besides free space.

    Raises:
        UserError: a disk has less.
    """
    most: dict[int, list[int]] = {}
    for path, total, first in needs:
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        device = there.stat().st_dev
        so_far = most.setdefault(device, [0, 0, shutil.disk_usage(there).free])
        so_far[0], so_far[1] = so_far[0] + total, so_far[1] + first
        if len(so_far) == 3:
            so_far.append(sum(_size(old) for old in freed if old.stat().st_dev == device))
        total, first, free, gain = so_far
        if max(first, total - gain) > free:
            raise UserError(
                f"the run needs {decimal(max(first, total - gain))} for checkpoints and models in '{path.parent}', and "
                f"the disk has {decimal(free)} left: free some space, {instead}"
            )


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
