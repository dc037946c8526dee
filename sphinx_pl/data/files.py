"""Where the bytes of data sets come from: local files as they are, everything else as a whole local copy in a cache.

    /a/b.tar                         read in place
    /a/b.jsonl.gz, .jsonl.zst        unpacked to the cache, since a compressed stream has no random access
    pipe:COMMAND                     the command's output (WebDataset's form), to the cache
    s3://..., https://..., SCHEME:// by fsspec, to the cache

The cache is `$SPHINX_CACHE` (default `~/.cache/sphinx_pl`). When its files are more than `$SPHINX_CACHE_GB` (default
200) those used longest ago, and not held open, are deleted, and fetched again when they are needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import subprocess
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sphinx_pl.data.bad import BadSample
from sphinx_pl.errors import UserError

log = logging.getLogger(__name__)

PACKED = (".gz", ".zst")
ATTEMPTS = 4
FIRST_WAIT = 0.5
"""Seconds before the second attempt at a file that cannot be read; doubled each time."""
_CHUNK = 1 << 22


def is_remote(url: str) -> bool:
    """Whether it is something else than a path."""
    return url.startswith("pipe:") or "://" in url


def cache_folder() -> Path:
    """Where copies and indices lie; made if it is not there."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sphinx_pl"
    folder = Path(os.environ.get("SPHINX_CACHE", default)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def identity(path: str) -> str:
    """A name for a file's contents as they are now: 32 hexadecimal digits that change with its size and time."""
    if is_remote(path) or _is_copy(path):  # a copy is named for what it holds
        text = path
    else:
        stat = Path(path).stat()
        text = f"{Path(path).absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _is_copy(path: str) -> bool:
    return Path(path).parent == cache_folder() / "files"


def local_file(url: str) -> tuple[str, bool]:
    """The path of a local file with the (unpacked) contents of `url`, and whether they are whole.

    A compressed file that is cut off gives what comes before the cut.

    Raises:
        BadSample: shard_missing, after several attempts.
    """
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _local_file(url)
        except OSError as error:
            reason = error.strerror or str(error)
            log.warning("%s cannot be read (%s), attempt %d of %d", url, reason, attempt, ATTEMPTS)
        if attempt < ATTEMPTS:
            time.sleep(wait)
            wait *= 2
    raise BadSample("shard_missing", f"{url}: {reason}")


def _local_file(url: str) -> tuple[str, bool]:
    if not is_remote(url) and not url.endswith(PACKED):
        if not Path(url).is_file():
            raise FileNotFoundError(2, "no such file", url)
        return url, True
    copy = cache_folder() / "files" / identity(url)
    cut = copy.with_name(copy.name + ".cut")
    for path in (copy, cut):
        if path.exists():
            with suppress(OSError):
                os.utime(path)  # in use
            return str(path), path is copy
    copy.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=copy.parent, prefix=".", delete=False) as file:
        temporary = Path(file.name)
        try:
            with _opened(url) as stream:
                whole = _copy(stream, file, url)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    target = copy if whole else cut
    temporary.replace(target)
    _prune(copy.parent, keep=target)
    return str(target), whole


def _copy(stream: IO[bytes], file: IO[bytes], url: str) -> bool:
    """Whether the stream ended as it should."""
    while True:
        try:
            # A compressed stream's read() would lose what it holds when it meets the cut, its read1() does not.
            chunk = stream.read1(_CHUNK) if hasattr(stream, "read1") else stream.read(_CHUNK)
        except (EOFError, OSError, zlib.error) as error:
            if not url.endswith(PACKED) or is_remote(url):
                raise OSError(5, str(error), url) from None
            log.warning("%s: %s: the lines before the cut are used", url, error)
            return False
        if not chunk:
            return True
        try:
            file.write(chunk)
        except OSError as error:  # not the archive's fault: it must not be taken for a cut one
            raise UserError(
                f"{url} cannot be copied to {file.name} ({error.strerror}): make room, or set SPHINX_CACHE to "
                "another folder"
            ) from None


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    """The bytes behind a URL, unpacked.

    Raises:
        UserError: a scheme that nothing installed can read.
        OSError: what is worth another attempt.
    """
    packing = Path(url).suffix if url.endswith(PACKED) else ""
    if url.startswith("pipe:"):
        with subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield process.stdout
        if process.returncode:
            raise OSError(5, f"the command ended with status {process.returncode}", url)
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
            if isinstance(error, UserError | BadSample):
                raise
            raise OSError(5, f"{type(error).__name__}: {error}", url) from None
    else:
        with Path(url).open("rb") as stream, _unpacked(stream, packing) as plain:
            yield plain


def _unpacked(stream: IO[bytes], packing: str) -> Any:
    if packing == ".gz":
        import gzip

        return gzip.open(stream)
    if packing == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(stream, "zstd")
    return stream


def _prune(folder: Path, keep: Path) -> None:
    """Delete the copies that were used longest ago until the rest is within the bound; the newest stays in any case."""
    bound = float(os.environ.get("SPHINX_CACHE_GB", "200")) * 1e9
    files = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process prunes too
            stat = path.stat()
            files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= bound:
            break
        if path != keep and not path.name.startswith(".") and not _is_held(path):
            path.unlink(missing_ok=True)
            total -= size


class Hold:
    """Keeps a copy in the cache as long as it exists: a shared lock, which other processes see too."""

    def __init__(self, path: str) -> None:
        self._path = path
        if _is_copy(path):  # nothing deletes other files
            self._handle = os.open(path, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __reduce__(self) -> tuple[type[Hold], tuple[str]]:
        return Hold, (self._path,)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


class _Handles(threading.local):
    """A thread's open files by path, the one used last at the end."""

    LIMIT = 64

    def __init__(self) -> None:
        self.opened: OrderedDict[str, int] = OrderedDict()

    def get(self, path: str) -> int:
        handle = self.opened.get(path)
        if handle is not None and os.fstat(handle).st_nlink == 0:  # deleted; if another has its name, that one is meant
            with suppress(OSError):
                self.opened[path] = os.open(path, os.O_RDONLY)
                os.close(handle)
        elif handle is None:
            self.opened[path] = os.open(path, os.O_RDONLY)
            if len(self.opened) > self.LIMIT:
                os.close(self.opened.popitem(last=False)[1])
        self.opened.move_to_end(path)
        return self.opened[path]


_HANDLES = _Handles()


def read_span(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file at `offset`, fewer where it ends before. Files stay open for the next call.

    `pread` has no file position, so a forked worker may go on with its parent's handles.

    Raises:
        OSError
    """
    return os.pread(_HANDLES.get(path), size, offset)
