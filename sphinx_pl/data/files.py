"""The bytes of data sets: local files are read in place, everything else from a whole local copy in
a cache.

    /a/b.tar                         read in place
    /a/b.jsonl.gz, .zst, .tgz        unpacked to the cache, since a compressed stream has no random access
    pipe:COMMAND                     the command's output (WebDataset's form), to the cache
    s3://..., https://..., SCHEME:// by fsspec, to the cache

The cache is `$SPHINX_CACHE` (default `~/.cache/sphinx_pl`). If its files take more than
`$SPHINX_CACHE_GB` (default 200), the files used longest ago that nobody holds open are deleted.
They are fetched again when they are needed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import os
import shutil
import stat
import subprocess
import threading
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import user_path

log = logging.getLogger(__name__)

PACKED = (".gz", ".tgz", ".zst")
ATTEMPTS = 4
FIRST_WAIT = 0.5
"""Seconds before a file is read again after a failure. Each attempt doubles them."""
RETRY_AFTER = 60.0
"""Seconds without a new attempt after all attempts at a file failed. So a run does not wait for
every record of a shard that is gone."""
_CHUNK = 1 << 22
_ABANDONED = 24 * 3600.0
"""Seconds after which a half-written copy counts as that of a killed process."""
_SMALL = 1 << 14
_STRETCHES = 16
_failed: dict[str, tuple[float, str]] = {}  # URL -> when it failed at every attempt, and why

T = TypeVar("T")


def is_remote(url: str) -> bool:
    """Whether a URL is something else than a path."""
    return url.startswith("pipe:") or "://" in url


def fingerprint(url: str) -> str | None:
    """A text that tells a local file from one with other contents, wherever it lies; None for
    anything else.

    It follows from the size and from `_STRETCHES` stretches of the bytes, so a file of 256 KiB is
    compared as a whole, and a shard of gigabytes costs no more.
    """
    try:
        status = os.stat(url)  # noqa: PTH116 - pathlib's raises for other things too
        return _fingerprint(url, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=4096)
def _fingerprint(path: str, size: int, modified: int) -> str:
    crc = 0
    with Path(path).open("rb") as file:
        for number in range(_STRETCHES):
            file.seek(number * max(size - _SMALL, 0) // (_STRETCHES - 1))
            crc = zlib.crc32(file.read(_SMALL), crc)
    return f"{size}-{crc:08x}"


def cache_folder(kind: str) -> Path:
    """The folder of copies ("files") or of indices ("spans"). It is made if it is missing.

    Raises:
        UserError: the folder cannot be made.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sphinx_pl"
    folder = user_path(os.environ.get("SPHINX_CACHE", default)) / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_room(folder, error) from None
    return folder


def _no_room(path: Path, error: OSError) -> UserError:
    """The error of a full or read-only cache, which is no fault of the shard."""
    return UserError(
        f"{path} in the cache cannot be written ({error.strerror or error}): make room, or set SPHINX_CACHE to another "
        "folder"
    )


class CacheFile:
    """A file of the cache while it is written. Under its name it is whole or missing.

    Its temporary name is unique, since ranks make the same files at the same time.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name[:64]}.{uuid.uuid4().hex}.tmp")
        try:
            self._file: IO[bytes] = self._temporary.open("xb")
        except OSError as error:
            raise _no_room(path, error) from None

    def __enter__(self) -> CacheFile:
        return self

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            raise _no_room(self.path, error) from None

    def keep(self, path: Path | None = None) -> None:
        """Move the whole file to its name, or to `path`."""
        try:
            self._file.close()
            self._temporary.replace(path or self.path)
        except OSError as error:
            raise _no_room(self.path, error) from None

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def cached_array(name: str, make: Callable[[], npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """An array that is made once and kept in the cache. It is mapped from there, so ranks and
    workers share it."""
    path = cache_folder("spans") / f"{name}.npy"
    with suppress(Exception):  # missing, or incomplete after a full disk
        mapped: npt.NDArray[np.int64] = np.load(path, mmap_mode="r")
        return mapped
    array = make()
    with CacheFile(path) as file:
        np.save(file, array)
        file.keep()
    mapped = np.load(path, mmap_mode="r")
    return mapped


def identity(path: str) -> str:
    """A name for a file's contents: 32 hexadecimal digits that change with its size and time."""
    if is_remote(path) or _is_copy(path):  # a copy is named for what it holds
        text = path
    else:
        stat = Path(path).stat()
        text = f"{Path(path).absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _is_copy(path: str) -> bool:
    return Path(path).parent == cache_folder("files")


def patiently(url: str, attempt: Callable[[], T]) -> T:
    """The result of `attempt`, which is repeated after a wait if it raises an OSError.

    Raises:
        OSError: all attempts failed, now or less than RETRY_AFTER seconds ago.
    """
    since, reason = _failed.get(url, (-math.inf, ""))
    if time.monotonic() - since < RETRY_AFTER:
        raise OSError(errno.EIO, reason, url)
    wait = FIRST_WAIT
    for number in range(1, ATTEMPTS + 1):
        try:
            result = attempt()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # not the file's fault
                raise UserError(f"{url}: {error.strerror}: raise the limit with `ulimit -n`") from None
            reason = error.strerror or str(error)
            log.warning("%s cannot be read (%s), attempt %d of %d", url, reason, number, ATTEMPTS)
        else:
            _failed.pop(url, None)
            return result
        if number < ATTEMPTS:
            time.sleep(wait)
            wait *= 2
    _failed[url] = time.monotonic(), reason
    raise OSError(errno.EIO, reason, url)


def local_file(url: str) -> tuple[str, bool]:
    """The path of a local file with the (unpacked) contents of `url`, and whether they are whole.

    Of a compressed file that is cut off, the contents before the cut are given.

    Raises:
        OSError: the file cannot be read. Another attempt may succeed (see `patiently`).
    """
    if not is_remote(url) and not url.endswith(PACKED):
        if not Path(url).is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", url)
        return url, True
    copy = cache_folder("files") / identity(url)
    cut = copy.with_name(copy.name + ".cut")
    with _alone(copy):  # otherwise all ranks of a node would fetch it
        for path in (copy, cut):
            if in_cache(path):
                return str(path), path is copy
        with CacheFile(copy) as file:
            with _opened(url) as stream:
                whole = _copy(stream, file, url)
            target = copy if whole else cut
            file.keep(target)
    prune(keep=target)
    return str(target), whole


def in_cache(copy: Path) -> bool:
    """Whether the copy exists. If it does, it counts as used now."""
    try:
        os.utime(copy)
    except OSError:
        return copy.exists()
    return True


@contextmanager
def _alone(copy: Path) -> Iterator[None]:
    """A lock: no other process makes the same copy meanwhile, if the file system has locks."""
    lock = copy.with_name(f".{copy.name}.lock")
    with lock.open("wb") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _copy(stream: IO[bytes], file: CacheFile, url: str) -> bool:
    """Whether the stream was whole."""
    # At a cut, read() of a compressed stream loses what it holds. gzip has read1(); zstd loses
    # little.
    size = _SMALL if url.endswith(".zst") else _CHUNK
    while True:
        try:
            chunk = stream.read1(size) if hasattr(stream, "read1") else stream.read(size)
        except (EOFError, OSError, zlib.error) as error:
            # Errors of the disk have a number, errors of the decompressor have none.
            if not url.endswith(PACKED) or is_remote(url) or getattr(error, "errno", None) is not None:
                raise OSError(errno.EIO, str(error), url) from None
            log.warning("%s: %s: the lines before the cut are used", url, str(error))
            return False
        if not chunk:
            return True
        file.write(chunk)


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    """The bytes behind a URL, unpacked.

    Raises:
        UserError: no installed package reads the scheme.
        OSError: another attempt may succeed.
    """
    packing = Path(url).suffix if url.endswith(PACKED) and not url.startswith("pipe:") else ""
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        bash = shutil.which("bash")
        # Without pipefail, only the failure of a pipe's last command is noticed.
        shell = [bash, "-o", "pipefail", "-c", command] if bash else ["sh", "-c", command]
        with subprocess.Popen(shell, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield process.stdout
        if process.returncode:
            raise OSError(errno.EIO, f"the command ended with status {process.returncode}", url)
    elif is_remote(url):
        import fsspec

        try:
            opened = fsspec.open(url, "rb")
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: {error}") from None
        try:
            with opened as stream, _unpacked(stream, packing) as plain:
                yield plain
        except OSError:
            raise
        except Exception as error:  # the file systems behind fsspec have exceptions of their own
            if isinstance(error, UserError):
                raise
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", url) from None
    else:
        with Path(url).open("rb") as stream, _unpacked(stream, packing) as plain:
            yield plain


def _unpacked(stream: IO[bytes], packing: str) -> Any:
    if packing in (".gz", ".tgz"):
        import gzip

        return gzip.open(stream)
    if packing == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(stream, "zstd")
    return stream


def prune(keep: Path) -> None:
    """Delete the copies used longest ago until the rest is within the limit, but never `keep`."""
    bound = float(os.environ.get("SPHINX_CACHE_GB", "200")) * 1e9
    files = []
    for path in cache_folder("files").iterdir():
        with suppress(OSError):  # another process prunes too
            stat = path.stat()
            if not path.name.startswith("."):
                files.append((stat.st_mtime, stat.st_size, path))
            elif time.time() - stat.st_mtime > _ABANDONED:
                path.unlink()
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= bound:
            break
        if path != keep and _deleted(path):
            total -= size


class Hold:
    """Keeps a copy in the cache while this object exists, by a shared lock that other processes see
    too.

    Raises:
        OSError: the copy has just been deleted.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        if not _is_copy(path):  # nothing deletes other files
            return
        self._handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise  # it is being deleted
        except OSError:
            pass  # a file system without locks
        if os.fstat(self._handle).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "deleted from the cache", path)

    def __reduce__(self) -> tuple[type[Hold], tuple[str]]:
        return Hold, (self._path,)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


def _deleted(path: Path) -> bool:
    """Whether the copy was deleted. It is not if somebody holds it; the lock keeps others from
    holding it meanwhile."""
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


class _Handles(threading.local):
    """The open files of a thread by URL. The file used last is at the end."""

    LIMIT = 64

    def __init__(self) -> None:
        self.opened: OrderedDict[str, int] = OrderedDict()

    def get(self, url: str) -> int:
        handle = self.opened.get(url)
        if handle is not None and os.fstat(handle).st_nlink == 0:  # deleted: open the file that has its name now
            with suppress(OSError):
                self.opened[url] = self._open(url)
                os.close(handle)
        elif handle is None:
            self.opened[url] = self._open(url)
            if len(self.opened) > self.LIMIT:
                os.close(self.opened.popitem(last=False)[1])
        self.opened.move_to_end(url)
        return self.opened[url]

    def _open(self, url: str) -> int:
        return os.open(local_file(url)[0], os.O_RDONLY)

    def drop(self, url: str) -> None:
        if (handle := self.opened.pop(url, None)) is not None:
            os.close(handle)


_HANDLES = _Handles()


def read_span(url: str, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a file or of the copy of a URL; fewer at its end.

    Files stay open for the next call. `pread` has no file position, so a forked worker may use its
    parent's handles.

    Raises:
        OSError: after several attempts.
    """

    def attempt() -> bytes:
        try:
            return os.pread(_HANDLES.get(url), size, offset)
        except OSError:
            _HANDLES.drop(url)  # a handle can go stale
            raise

    return patiently(url, attempt)
