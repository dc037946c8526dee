"""Image-text pairs in WebDataset tar shards, as img2dataset writes them."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.entries import sizes
from sphinx_pl.data.files import Hold, is_remote, local_file
from sphinx_pl.data.record import ImageRef, Record
from sphinx_pl.data.sources.annotation import check_unicode, decoded, json_object, read
from sphinx_pl.data.sources.base import SOURCES, Shard, Source
from sphinx_pl.data.sources.filters import PairFilters
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.typed import build

log = logging.getLogger(__name__)

MAX_KEY = 1000
"""Bytes: all of a shard's keys take as much memory as its longest one."""
_OCTAL = re.compile(rb"([0-7]+)[ \0]*")
_TIMES = re.compile(rb"(?:\d+ [acm]time=[\d.]+\n)+")


class ImageTextSource(Source):
    """`.jpg` (or png, webp) with `.txt`, `.json` or both.

    The caption is the `.txt`, else the json's "caption"; the json's "width" and "height" are the stored image's size,
    its other keys become the record's meta.

    Args:
        filters: keys of `PairFilters`.
    """

    def __init__(
        self,
        name: str,
        path: str | Sequence[str],
        task: str = "caption",
        filters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, path)
        self.task = TASKS[task].name
        self.filters = build(PairFilters, filters or {}, f"data.sources.{name}.filters")

    def _open(self, number: int) -> Shard:
        return _TarShard(self, self.urls[number], self.shard_names[number])

    def count(self, number: int) -> int | None:
        """img2dataset's own count, in `<shard>_stats.json` beside the shard."""
        url = self.urls[number]
        if is_remote(url):
            return None
        try:
            stats = json.loads(Path(url).with_name(f"{Path(url).stem}_stats.json").read_bytes())
            return int(stats["successes"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None


class _TarShard(Shard):
    """Keys [n] and, of image, text and json, (offset, size) [n, 3, 2]; size -1: not there.

    Samples are runs of members with one key, the name up to its first dot, as WebDataset has it.
    """

    KINDS: ClassVar[Mapping[str, int]] = {"jpg": 0, "jpeg": 0, "png": 0, "webp": 0, "txt": 1, "json": 2}

    def __init__(self, source: ImageTextSource, url: str, name: str) -> None:
        self.source = source
        self.url = url
        self.name = name
        self.skipped = Counter()
        self.path, _ = local_file(url)
        self._hold = Hold(self.path)
        keys: list[bytes] = []
        spans = array("q")
        seen: set[str] = set()
        for key, members in itertools.groupby(self._members(), key=lambda member: member[0]):
            sample = [0, -1] * 3
            encoded = key.encode("utf-8", "surrogateescape")
            repeated = key in seen
            for _, kind, offset, size in members:
                repeated |= sample[2 * kind + 1] >= 0
                sample[2 * kind : 2 * kind + 2] = offset, size
            seen.add(key)
            if repeated:
                self.skipped["duplicate_key"] += 1
            elif len(encoded) > MAX_KEY:
                self.skipped["key_too_long"] += 1
            elif sample[1] < 0:
                self.skipped["image_absent"] += 1
            elif sample[3] < 0 and sample[5] < 0:
                self.skipped["caption_absent"] += 1
            else:
                keys.append(encoded)
                spans.extend(sample)
        self.keys = np.array(keys, dtype=np.bytes_)
        self.spans: npt.NDArray[np.int64] = np.array(spans, dtype=np.int64).reshape(-1, 3, 2)

    def __len__(self) -> int:
        return len(self.keys)

    def record(self, index: int) -> Record:
        key = f"{self.name}/{self.keys[index].decode('utf-8', 'replace')}"
        (offset, size), text, annotation = self.spans[index].tolist()
        meta = json_object(self._read(annotation, key), key) if annotation[1] >= 0 else {}
        caption: Any = decoded(self._read(text, key), "caption", key) if text[1] >= 0 else meta.get("caption")
        meta.pop("caption", None)
        if not isinstance(caption, str) or not caption.strip():
            raise BadSample("caption_empty", key)
        check_unicode(caption, "caption", key)
        record = Record(
            key=key,
            task=self.source.task,
            images=(ImageRef(self.url, offset, size),),
            sizes=sizes(meta.pop("width", None), meta.pop("height", None), key),
            answer=caption.strip(),
            meta=meta,
        )
        self.source.filters.check(record)
        return record

    def images(self, index: int) -> object:
        return None  # each has its own

    def _read(self, span: tuple[int, int], key: str) -> bytes:
        return read(self.path, *span, key)

    def _members(self) -> Iterator[tuple[str, int, int, int]]:
        """(key, kind, offset, size) of each whole member of interest, up to the end or the cut."""
        path = Path(self.path)
        end = path.stat().st_size
        try:
            tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below, but what fails here is another reason
        except Exception as error:  # damaged headers make tarfile raise nearly anything
            log.warning("%s: %s", self.url, str(error))  # the error itself would keep the shard open
            self.skipped["shard_unreadable"] += 1
            return
        whole = False
        with tar, path.open("rb") as file, contextlib.suppress(Exception):  # as above
            member = tar.next()
            while member and member.size >= 0 and member.offset_data + member.size <= end:
                # tarfile would keep every header; a size below 0 would never end.
                tar.members = []  # type: ignore[attr-defined]
                key, extension = _split_name(member.name)
                if member.isfile() and extension in self.KINDS:
                    yield key, self.KINDS[extension], member.offset_data, member.size
                # tarfile takes ten times as long for a header: it reads only those that are out of the ordinary.
                while not tar.pax_headers and (plain := _plain_header(file.fileno(), tar.offset, tar.encoding)):
                    name, offset, size = plain
                    if offset + size > end:
                        break
                    tar.offset = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    key, extension = _split_name(name)
                    if extension in self.KINDS:
                        yield key, self.KINDS[extension], offset, size
                member = tar.next()
            # tarfile takes a damaged or missing header for the end; a whole archive ends with a block of zeros.
            whole = member is None and self._zeros_at(tar.offset)
        if not whole:
            log.warning("%s is cut off: the samples before the cut are used", self.url)
            self.skipped["shard_truncated"] += 1

    def _zeros_at(self, offset: int) -> bool:
        with Path(self.path).open("rb") as file:
            file.seek(offset)
            return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _split_name(name: str) -> tuple[str, str]:
    """Path -> key and extension, which begins at the file name's first dot."""
    if name.startswith(".") or name.endswith("/") or any(part in name for part in ("//", "/.", "./")):
        path = PurePosixPath(name)
        stem, _, extension = path.name.partition(".")
        return str(path.parent / stem), extension.lower()
    folder, slash, name = name.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _plain_header(file: int, at: int, encoding: str) -> tuple[str, int, int] | None:
    """(name, where its data begin, size) of the regular file whose header is at `at`; None: this must be left to
    tarfile. A PAX header before it may only say times, as every one that img2dataset writes does."""
    block = os.pread(file, 3 * tarfile.BLOCKSIZE, at)
    if block[156:157] == tarfile.XHDTYPE:
        size = _checked_size(block)
        records = block[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + size]
        if not 0 < size <= tarfile.BLOCKSIZE or not _TIMES.fullmatch(records):
            return None
        at, block = at + 2 * tarfile.BLOCKSIZE, block[2 * tarfile.BLOCKSIZE :]
    if block[156:157] != tarfile.REGTYPE or (size := _checked_size(block)) < 0:
        return None
    name, prefix = (field.split(b"\0", 1)[0] for field in (block[:100], block[345:500]))
    if prefix:
        name = prefix + b"/" + name
    return name.decode(encoding, "surrogateescape"), at + tarfile.BLOCKSIZE, size


def _checked_size(block: bytes) -> int:
    """The size in a header, -1 if it is none or is written in another way than in octal digits."""
    block = block[: tarfile.BLOCKSIZE]
    size, checksum = (_OCTAL.fullmatch(field) for field in (block[124:136], block[148:156]))
    if not size or not checksum or int(checksum[1], 8) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return -1
    return int(size[1], 8)


SOURCES.register("image_text", ImageTextSource)
