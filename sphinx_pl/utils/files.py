"""Writes files atomically and checks paths, disks and hashes."""

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


def user_path(path: str | Path) -> Path:
    """The path with `~` and `~NAME` replaced by a home folder. An unknown name stays as it is.

    pathlib raises RuntimeError for such a name, which may also be a file's.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` at the end.

    A kill leaves the old file or none. After an exception the temporary file is deleted.
    """
    # Each rank and thread has its own temporary name, since several may write the same file. The
    # last one wins.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident():x}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically. Text is encoded as UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def replaced(path: Path) -> Path:
    """Return the name of a folder that is being deleted because another one takes its place."""
    return path.with_name(f".{path.name}.replaced.tmp")


def discard(path: Path) -> None:
    """Delete a folder.

    It is renamed first, so a kill never leaves half a checkpoint under its name.
    """
    if not path.exists():
        return
    trash = replaced(path)
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash)


def finite(content: Any) -> Any:
    """Return the content with null for every number that is NaN or infinite.

    JSON cannot express such numbers, and other programs refuse them.
    """
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _no_folder(path: Path, key: str, error: OSError) -> UserError:
    return UserError(f"{key}: '{path}' cannot be a folder ({error.strerror or error}): choose another path")


def make_folder(path: Path, key: str) -> None:
    """Make a folder.

    Args:
        key: the key that the user gave the path with.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(path, key, error) from None


def check_folder(path: Path, key: str) -> None:
    """Check that a folder can be made, before a long computation. Nothing is made.

    Args:
        key: the key that the user gave the path with.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        with TemporaryDirectory(prefix=".", dir=parent):
            pass
    except OSError as error:
        raise _no_folder(path, key, error) from None


def check_writable(path: Path, key: str) -> None:
    """Check that a file can be written, before a long computation. Its folder is made.

    Args:
        key: the key that the user gave the path with.

    Raises:
        UserError: the file cannot be written.
    """
    make_folder(path.absolute().parent, key)
    if path.is_dir():
        raise UserError(f"{key}: '{path}' is a folder: give the path of a file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{key}: '{path}' cannot be written: choose another path")


_POINTER = b"version https://git-lfs"


def check_pointer(path: Path) -> None:
    """Check that a file is not a Git LFS pointer, which stands for a file that was not fetched.

    Raises:
        UserError: it is a pointer.
    """
    if not path.is_file() or path.stat().st_size > 1024:
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"'{path}' is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download it"
            )


def check_disks(needs: Iterable[tuple[Path, int, int]], freed: Iterable[Path], instead: str) -> None:
    """Check that the disks have room for the files that a run will write.

    Args:
        needs: for each folder, the largest number of bytes it will hold, and the bytes written
            before anything is deleted.
        freed: files and folders that are deleted while the run writes.
        instead: what helps besides free space.

    Raises:
        UserError: a disk has too little space.
    """
    most: dict[int, list[int]] = {}
    for path, total, first in needs:
        parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        device = parent.stat().st_dev
        so_far = most.setdefault(device, [0, 0, shutil.disk_usage(parent).free])
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
    """Return the SHA-256 of a file's bytes in hexadecimal. The file is read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
