"""Image-text pairs in WebDataset tar shards, as img2dataset writes them."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
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
from sphinx_pl.data.files import Hold, Reader, is_remote, local_file
from sphinx_pl.data.record import ImageRef, Record
from sphinx_pl.data.sources.annotation import check_unicode, decoded, json_object, read
from sphinx_pl.data.sources.base import SOURCES, Shard, Source
from sphinx_pl.data.sources.filters import PairFilters
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.typed import build

log = logging.getLogger(__name__)

MAX_KEY = 1000
"""Bytes: all of a shard's keys take as much memory as its longest one."""


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
        self.reader = Reader()

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
        return read(self.source.reader, self.path, *span, key)

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
        with tar, contextlib.suppress(Exception):  # as above
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # else tarfile would keep every header
                if member.size < 0 or member.offset_data + member.size > end:  # below 0 it would never end
                    break
                file = PurePosixPath(member.name)
                stem, _, extension = file.name.partition(".")
                if member.isfile() and extension.lower() in self.KINDS:
                    yield str(file.parent / stem), self.KINDS[extension.lower()], member.offset_data, member.size
            # tarfile takes a damaged or missing header for the end; a whole archive ends with a block of zeros.
            whole = member is None and self._zeros_at(tar.offset)
        if not whole:
            log.warning("%s is cut off: the samples before the cut are used", self.url)
            self.skipped["shard_truncated"] += 1

    def _zeros_at(self, offset: int) -> bool:
        with Path(self.path).open("rb") as file:
            file.seek(offset)
            return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


SOURCES.register("image_text", ImageTextSource)
