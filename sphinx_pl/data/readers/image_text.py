"""Image-text pairs in WebDataset tar shards, as img2dataset writes them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sphinx_pl.data.files import Hold, is_remote, local_file
from sphinx_pl.data.readers.annotation import decoded, json_object, read
from sphinx_pl.data.readers.base import READERS, Shard
from sphinx_pl.data.readers.pairs import Members, PairReader, PairShard
from sphinx_pl.data.schema import ImageRef, Record

log = logging.getLogger(__name__)

_OCTAL = re.compile(rb"([0-7]+)[ \0]*")
_TIMES = re.compile(rb"(?:\d+ [acm]time=[\d.]+\n)+")


class ImageTextReader(PairReader):
    """Reads images (`.jpg`, `.png`, `.webp`, ...) with a text (`.txt`), a `.json` or both under one
    name.

    The caption is the text, else the json's "caption". The json's "width" and "height" are the size
    of the stored image. Its other keys become the record's meta.
    """

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


class _TarShard(PairShard):
    """Keys [n], and (offset, size) of image, text and json [n, 3, 2]; size -1 means no file."""

    def __init__(self, source: ImageTextReader, url: str, name: str) -> None:
        super().__init__()
        self.source = source
        self.url = url
        self.name = name
        self.path, _ = local_file(url)
        self._hold = Hold(self.path)
        members = Members(self)
        for member in self._members():
            members.add(*member)
        self.keys, self.spans = members.samples()

    def __len__(self) -> int:
        return len(self.keys)

    def record(self, index: int) -> Record:
        key, image, text, annotation = self._parts(index)
        columns = json_object(self._read(annotation, key), key) if annotation[1] >= 0 else {}
        caption: Any = decoded(self._read(text, key), "caption", key) if text[1] >= 0 else columns.get("caption")
        return self.source.pair(key, ImageRef(self.url, *image), caption, columns)

    def columns(self, index: int) -> Mapping[str, Any]:
        key, _, _, annotation = self._parts(index)
        return json_object(self._read(annotation, key), key) if annotation[1] >= 0 else {}

    def _parts(self, index: int) -> tuple[str, tuple[int, int], tuple[int, int], tuple[int, int]]:
        image, text, annotation = map(tuple, self.spans[index].tolist())
        return f"{self.name}/{self.keys[index].decode('utf-8', 'replace')}", image, text, annotation

    def _read(self, span: tuple[int, int], key: str) -> bytes:
        return read(self.path, *span, key)

    def _members(self) -> Iterator[tuple[str, int, int]]:
        """(name, offset, size) of each whole file up to the end or the cut."""
        path = Path(self.path)
        with path.open("rb") as file:
            begin: int | None = 0
            while begin is not None:  # archives may lie one after another, as `cat a.tar b.tar` makes them
                try:
                    file.seek(begin)
                    tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closed below
                except Exception as error:  # damaged headers make tarfile raise nearly anything
                    log.warning(
                        "%s, from byte %d on: %s", self.url, begin, str(error)
                    )  # the error itself would keep the shard open
                    self.skip("shard_unreadable", f"{self.url}, from byte {begin} on: {error}")
                    return
                with tar:
                    begin = yield from self._archive(tar, file)

    def _archive(self, tar: tarfile.TarFile, file: IO[bytes]) -> Generator[tuple[str, int, int], None, int | None]:
        """The files of one archive. Returns the start of the next archive, None without one."""
        end = os.fstat(file.fileno()).st_size
        whole = False
        with contextlib.suppress(Exception):  # as above
            member = tar.next()
            while member and member.size >= 0 and member.offset_data + member.size <= end:
                # tarfile would keep every header. A size below 0 would never end.
                tar.members = []  # type: ignore[attr-defined]
                if member.isfile():
                    yield member.name, member.offset_data, member.size
                else:
                    self.leave(
                        "folder" if member.isdir() else "link" if member.issym() or member.islnk() else "other",
                        member.name,
                    )
                # tarfile takes ten times as long for a header, so it reads only unusual ones.
                while not tar.pax_headers and (plain := _plain_header(file.fileno(), tar.offset, tar.encoding)):
                    name, offset, size = plain
                    if offset + size > end:
                        break
                    tar.offset = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    yield name, offset, size
                member = tar.next()
            # tarfile takes a damaged or missing header for the end. A whole archive ends with a
            # block of zeros.
            whole = member is None and os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) == bytes(
                tarfile.BLOCKSIZE
            )
        if not whole:
            log.warning("%s is cut off: the samples before the cut are used", self.url)
            self.skip("shard_truncated", f"{self.url}: damaged or cut off at byte {tar.offset} of {end}")
            return None
        return _after_zeros(file.fileno(), tar.offset)


def _after_zeros(file: int, at: int) -> int | None:
    """The first block from `at` on that is not all zeros; None if there is none."""
    while chunk := os.pread(file, 1 << 20, at):
        if rest := chunk.lstrip(b"\0"):
            return at + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        at += len(chunk)
    return None


def _plain_header(file: int, at: int, encoding: str) -> tuple[str, int, int] | None:
    """(name, offset of the data, size) of the regular file whose header is at `at`; None if only
    tarfile can read it.

    A PAX header before it may only give times, as those of img2dataset do.
    """
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
    """The size in a header; -1 if there is none, or if it is not written in octal digits."""
    block = block[: tarfile.BLOCKSIZE]
    size, checksum = (_OCTAL.fullmatch(field) for field in (block[124:136], block[148:156]))
    if not size or not checksum or int(checksum[1], 8) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return -1
    return int(size[1], 8)


READERS.register("image_text", ImageTextReader)
