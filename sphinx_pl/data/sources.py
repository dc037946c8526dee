"""Where records come from: tar shards of image-text pairs, text documents, instruction files.

A source indexes its files when it is built and keeps offsets, not contents. `record(index)` reads the few bytes of
annotation that it needs and decodes no image. Sources pickle, and work in forked and spawned worker processes.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import logging
import os
import re
import tarfile
import tempfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.entries import sizes, to_record
from sphinx_pl.data.record import ImageRef, Record
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.errors import UserError, suggest
from sphinx_pl.registry import Registry

log = logging.getLogger(__name__)

Offsets = npt.NDArray[np.int64]


class Source(ABC):
    """A numbered list of records.

    Args:
        name: what configurations, counters and keys call it.
        path: a file, a glob, a brace range as WebDataset writes them (`{000..003}`), or a list of these.

    Raises:
        UserError: no file is there.
    """

    def __init__(self, name: str, path: str | Sequence[str]) -> None:
        self.name = name
        self.paths = expand_paths(name, path)
        self.skipped: Counter[str] = Counter()
        """What was unreadable when the index was built: reason -> count."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, index: int) -> Record:
        """The record at `index`, 0 <= index < len(self); no image is decoded.

        Raises:
            BadSample: the record is broken.
        """


def spread(length: int, at_most: int | None) -> list[int]:
    """At most so many of `length` indices, evenly over all of them: a file's first entries are often of one kind."""
    count = min(length, at_most or length)
    return [i * length // count for i in range(count)]


SOURCES: Registry[type[Source]] = Registry("source kind")


def build_source(kind: str, name: str, path: str | Sequence[str], **options: Any) -> Source:
    """A source of the registered `kind`.

    Raises:
        UserError: an unknown kind or option, or no file is there.
    """
    check_options(kind, f"source '{name}'", options)
    return SOURCES[kind](name, path, **options)


def check_options(kind: str, where: str, options: Iterable[str]) -> None:
    """Whether sources of `kind` have these options, without building one.

    Raises:
        UserError: an unknown kind or option, at the place that `where` names.
    """
    known = [option for option in inspect.signature(SOURCES[kind]).parameters if option not in ("name", "path")]
    for option in options:
        if option not in known:
            raise UserError(f"{where} of kind {kind} has no option '{option}': {suggest(option, known)}")


def expand_paths(name: str, path: str | Sequence[str]) -> list[str]:
    """The files of a path setting, each pattern's in sorted order; every pattern must match something."""
    found: list[str] = []
    for pattern in [path] if isinstance(path, str) else path:
        for single in _expand_braces(str(Path(pattern).expanduser())):
            matches = [single] if Path(single).exists() else sorted(glob.glob(single, recursive=True))  # noqa: PTH207
            matches = [match for match in matches if Path(match).is_file()]
            if not matches:
                raise UserError(
                    f"source '{name}': there is no file '{single}': correct its path, "
                    "or make the sample data with `python -m sphinx_pl.data.sample`"
                )
            found += matches
    if not found:
        raise UserError(f"source '{name}' has an empty list of paths: name at least one file")
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    """`a{008..010}` -> a008, a009, a010."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        for rest in _expand_braces(pattern[match.end() :]):
            yield f"{pattern[: match.start()]}{number:0{len(first)}d}{rest}"


def _short_names(paths: Sequence[str]) -> list[str]:
    """Names that tell the files apart and do not change when the data move: paths below the common folder."""
    absolute = [Path(path).absolute() for path in paths]
    common = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(common).as_posix() for path in absolute]


class _Reader:
    """Reads spans of files through a few open handles.

    `pread` has no file position, so a forked worker may share the handles; pickled, they are left behind.
    """

    LIMIT = 32

    def __init__(self) -> None:
        self._handles: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[_Reader], tuple[()]]:
        return _Reader, ()

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`.

        Raises:
            BadSample: file_unreadable.
        """
        try:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
                if len(self._handles) > self.LIMIT:
                    os.close(self._handles.popitem(last=False)[1])
            self._handles.move_to_end(path)
            return os.pread(self._handles[path], size, offset)
        except OSError as error:
            raise BadSample("file_unreadable", f"{path}: {error.strerror}") from None


class _Shard:
    """The samples of one tar: keys [n] and, of image, text and json, (offset, size) [n, 3, 2]; size -1: not there.

    Samples are runs of members with one key, the name up to its first dot, as WebDataset has it.
    """

    KINDS: ClassVar[Mapping[str, int]] = {"jpg": 0, "jpeg": 0, "png": 0, "webp": 0, "txt": 1, "json": 2}

    def __init__(self, path: str, skipped: Counter[str]) -> None:
        self.path = path
        keys: list[bytes] = []
        spans = array("q")
        seen: set[str] = set()
        for key, members in itertools.groupby(self._members(path, skipped), key=lambda member: member[0]):
            sample = [0, -1] * 3
            repeated = key in seen
            for _, kind, offset, size in members:
                repeated |= sample[2 * kind + 1] >= 0
                sample[2 * kind : 2 * kind + 2] = offset, size
            seen.add(key)
            if repeated:
                skipped["duplicate_key"] += 1
            elif sample[1] < 0:
                skipped["image_absent"] += 1
            elif sample[3] < 0 and sample[5] < 0:
                skipped["caption_absent"] += 1
            else:
                keys.append(key.encode("utf-8", "surrogateescape"))
                spans.extend(sample)
        self.keys = np.array(keys, dtype=np.bytes_)
        self.spans: Offsets = np.array(spans, dtype=np.int64).reshape(-1, 3, 2)

    @classmethod
    def _members(cls, path: str, skipped: Counter[str]) -> Iterator[tuple[str, int, int, int]]:
        """(key, kind, offset, size) of each whole member of interest, up to the end or the cut."""
        end = Path(path).stat().st_size
        try:
            tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below, but what fails here is another reason
        except Exception as error:  # damaged headers make tarfile raise nearly anything
            log.warning("%s: %s", path, error)
            skipped["shard_unreadable"] += 1
            return
        whole = False
        with tar, contextlib.suppress(Exception):  # as above
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # else tarfile would keep every header
                if member.size < 0 or member.offset_data + member.size > end:  # below 0 it would never end
                    break
                file = PurePosixPath(member.name)
                stem, _, extension = file.name.partition(".")
                if member.isfile() and extension.lower() in cls.KINDS:
                    yield str(file.parent / stem), cls.KINDS[extension.lower()], member.offset_data, member.size
            # tarfile takes a damaged or missing header for the end; a whole archive ends with a block of zeros.
            whole = member is None and cls._zeros_at(path, tar.offset)
        if not whole:
            log.warning("%s is cut off: the samples before the cut are used", path)
            skipped["shard_truncated"] += 1

    @staticmethod
    def _zeros_at(path: str, offset: int) -> bool:
        with Path(path).open("rb") as file:
            file.seek(offset)
            return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


class ImageTextSource(Source):
    """Image-text pairs in WebDataset tar shards as img2dataset writes them: `.jpg` with `.txt`, `.json` or both.

    The caption is the `.txt`, else the json's "caption"; the json's "width" and "height" are the stored image's size,
    its other keys become the record's meta.

    Raises:
        UserError: no file is there, or none of them has a usable sample.
    """

    def __init__(
        self, name: str, path: str | Sequence[str], task: str = "caption", max_caption_chars: int = 2000
    ) -> None:
        super().__init__(name, path)
        self.task = TASKS[task].name
        self.max_caption_chars = max_caption_chars
        self._names = _short_names(self.paths)
        self._shards = [_Shard(file, self.skipped) for file in self.paths]
        self._ends = np.cumsum([len(shard.keys) for shard in self._shards])
        self._reader = _Reader()
        if not len(self):
            raise UserError(f"source '{name}': no usable sample in {self.paths[0]} and the like ({dict(self.skipped)})")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def record(self, index: int) -> Record:
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        row = index - int(self._ends[number]) + len(shard.keys)
        key = f"{self._names[number]}/{shard.keys[row].decode('utf-8', 'replace')}"
        (offset, size), text, annotation = shard.spans[row].tolist()

        meta = _json_object(self._reader.read(shard.path, *annotation), key) if annotation[1] >= 0 else {}
        caption: Any
        if text[1] >= 0:
            caption = _decoded(self._reader.read(shard.path, *text), "caption", key)
        else:
            caption = meta.get("caption")
        meta.pop("caption", None)
        if not isinstance(caption, str) or not caption.strip():
            raise BadSample("caption_empty", key)
        _check_unicode(caption, "caption", key)
        if len(caption) > self.max_caption_chars:
            raise BadSample("caption_too_long", f"{key}: {len(caption)} characters")
        return Record(
            key=key,
            task=self.task,
            images=(ImageRef(shard.path, offset, size),),
            sizes=sizes(meta.pop("width", None), meta.pop("height", None), key),
            answer=caption.strip(),
            meta=meta,
        )


class _Lines:
    """The non-empty lines of text files by number, read when asked for."""

    def __init__(self, paths: Sequence[str], skipped: Counter[str]) -> None:
        self._paths = [_unpacked(path, skipped) if path.endswith(".gz") else path for path in paths]
        self._names = _short_names(paths)
        self._reader = _Reader()
        files, offsets, sizes = array("l"), array("q"), array("q")
        for number, path in enumerate(self._paths):
            offset = 0
            with Path(path).open("rb") as file:
                for line in file:
                    if line.strip():
                        files.append(number)
                        offsets.append(offset)
                        sizes.append(len(line))
                    offset += len(line)
        self._files, self._offsets, self._sizes = (np.array(column) for column in (files, offsets, sizes))

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return f"{self._names[self._files[index]]}:{index - int(np.searchsorted(self._files, self._files[index]))}"

    def __getitem__(self, index: int) -> bytes:
        number = int(self._files[index])
        return self._reader.read(self._paths[number], int(self._offsets[index]), int(self._sizes[index]))


def _unpacked(path: str, skipped: Counter[str]) -> str:
    """A gzip file's contents as a file in the user's cache, since a compressed stream has no random access."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sphinx_pl"
    cache.mkdir(parents=True, exist_ok=True)
    stat = Path(path).stat()
    identity = f"{Path(path).absolute()} {stat.st_size} {stat.st_mtime_ns}"
    whole = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.jsonl"
    cut = whole.with_suffix(".cut")
    if not whole.exists() and not cut.exists():
        target = whole
        with gzip.open(path) as packed, tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            while True:
                try:
                    chunk = packed.read1(1 << 20)  # read() would lose what it holds when it meets the cut
                except (EOFError, OSError, zlib.error) as error:
                    log.warning("%s: %s: the lines before the cut are used", path, error)
                    target = cut
                    break
                if not chunk:
                    break
                try:
                    file.write(chunk)
                except OSError as error:  # not the archive's fault: it must not be taken for a cut one
                    Path(file.name).unlink()
                    raise UserError(f"{path} cannot be unpacked into {cache} ({error.strerror}): make room") from None
        Path(file.name).replace(target)
    if whole.exists():
        return str(whole)
    skipped["shard_truncated"] += 1
    return str(cut)


class TextSource(Source):
    """Documents of plain text, jsonl or jsonl.gz with one {"text": ...} a line. Task "text": all is supervised.

    Raises:
        UserError: no file is there, or they are empty.
    """

    def __init__(self, name: str, path: str | Sequence[str], task: str = "text") -> None:
        super().__init__(name, path)
        self.task = TASKS[task].name
        self._lines = _Lines(self.paths, self.skipped)
        if not len(self):
            raise UserError(f"source '{name}': {self.paths[0]} has no line: give a jsonl file with one text a line")

    def __len__(self) -> int:
        return len(self._lines)

    def record(self, index: int) -> Record:
        key = self._lines.key(index)
        text = _json_object(self._lines[index], key).get("text")
        if not isinstance(text, str) or not text.strip():
            raise BadSample("text_empty", key)
        _check_unicode(text, "text", key)
        return Record(key=key, task=self.task, answer=text)


class InstructionSource(Source):
    """Instructions: a json list, or jsonl (also .gz), of entries as `sphinx_pl.data.entries` describes them.

    A json list is held in memory as bytes, jsonl is not. An entry's "task" is by default the option `task`.

    Args:
        root: folder that image paths are relative to; by default that of the (first) instruction file.
        tasks: only entries of these tasks.
        where: only entries whose meta has these values.

    Raises:
        UserError: no file is there, one is not such a file, or no entry passes the filters.
    """

    def __init__(
        self,
        name: str,
        path: str | Sequence[str],
        root: str | None = None,
        task: str = "chat",
        tasks: Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, path)
        self.root = Path(root).expanduser() if root else Path(self.paths[0]).parent
        self.task = TASKS[task].name
        self.tasks = frozenset(TASKS[wanted].name for wanted in tasks) if tasks is not None else None
        self.where = dict(where or {})
        lists = [file.endswith(".json") for file in self.paths]
        if any(lists) and not all(lists):
            raise UserError(f"source '{name}' mixes .json and .jsonl files: make them two sources")
        self._entries = _Entries(name, self.paths) if lists[0] else _Lines(self.paths, self.skipped)
        self._rows = self._filtered()
        if not len(self):
            filters = f"tasks={tasks}, where={self.where}" if self.tasks or self.where else "no filter"
            raise UserError(f"source '{name}': none of the {len(self._entries)} entries is left with {filters}")

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        row = int(self._rows[index])
        key = self._entries.key(row)
        entry = _json_object(self._entries[row], key)
        if isinstance(entry.get("id"), str | int):
            key = f"{key}:{entry['id']}"
        return to_record(entry, key, self.root, self.task)

    def _filtered(self) -> Offsets:
        if self.tasks is None and not self.where:
            return np.arange(len(self._entries))
        rows = array("q")
        for row in range(len(self._entries)):
            try:
                entry = _json_object(self._entries[row], self._entries.key(row))
            except BadSample as bad:
                self.skipped[bad.reason] += 1
                continue
            task, meta = entry.get("task", self.task), entry.get("meta")
            if not isinstance(task, str):
                self.skipped["entry_malformed"] += 1
            elif (self.tasks is None or task in self.tasks) and all(
                isinstance(meta, dict) and meta.get(wanted) == value for wanted, value in self.where.items()
            ):
                rows.append(row)
        return np.array(rows, dtype=np.int64)


class _Entries:
    """The entries of json lists, each as bytes, in one buffer: no Python object for each, so forks share the memory."""

    def __init__(self, name: str, paths: Sequence[str]) -> None:
        buffer = bytearray()
        ends, keys = array("q", [0]), array("q", [0])
        for path in paths:
            try:
                entries = json.loads(Path(path).read_bytes())
            except ValueError as error:
                raise UserError(f"source '{name}': {path} is not readable as JSON ({error}): make it anew") from None
            if not isinstance(entries, list):
                raise UserError(f"source '{name}': {path} is not a JSON list of entries: see docs/configuration.md")
            for entry in entries:
                buffer += json.dumps(entry).encode()
                ends.append(len(buffer))
            keys.append(len(ends) - 1)
        self._buffer = bytes(buffer)
        self._ends = np.array(ends)
        self._firsts = np.array(keys)
        self._names = _short_names(paths)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def key(self, index: int) -> str:
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return f"{self._names[number]}:{index - int(self._firsts[number])}"

    def __getitem__(self, index: int) -> bytes:
        return self._buffer[self._ends[index] : self._ends[index + 1]]


SOURCES.register("image_text", ImageTextSource)
SOURCES.register("text", TextSource)
SOURCES.register("instructions", InstructionSource)


def _decoded(data: bytes, what: str, key: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadSample(f"{what}_not_utf8", f"{key}: {error}") from None


def _json_object(data: bytes, key: str) -> dict[str, Any]:
    try:
        value = json.loads(_decoded(data, "json", key))
    except (ValueError, RecursionError) as error:
        raise BadSample("json_unreadable", f"{key}: {error}") from None
    if not isinstance(value, dict):
        raise BadSample("entry_malformed", f"{key} is not an object")
    return value


def _check_unicode(text: str, what: str, key: str) -> None:
    """JSON can spell halves of a character ("\\ud83d", where a text was cut), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"{what}_not_utf8", f"{key}: {error}") from None
