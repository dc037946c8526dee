"""The index of a text file: (offset, size) of its lines, or of the items of a JSON list, without
parsing them.

An index is built in bounded memory and kept in the cache folder. It is mapped from there, so ranks
and workers share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from sphinx_pl.data.files import cached_array, identity

EntryIndex = npt.NDArray[np.int64]
"""[n, 2]: the offset and size of each entry in bytes."""

_CHUNK = 1 << 22  # a file of nothing but brackets takes forty times as much
_BACKSLASH, _QUOTE, _COMMA = b"\\", ord('"'), ord(",")
_STEP = np.zeros(256, np.int8)
_STEP[[ord("["), ord("{")]] = 1
_STEP[[ord("]"), ord("}")]] = -1
_STRUCTURE = _STEP != 0
_STRUCTURE[[_QUOTE, _COMMA]] = True
_BLANK = b" \t\r\n"
_IS_BLANK = np.zeros(256, bool)
_IS_BLANK[list(_BLANK)] = True
_MARK = b"\xef\xbb\xbf"
_PROBLEMS = ("shard_truncated", "", "text_after_list")  # at 1: none, as in indices that were made before there were two


def index_entries(path: str) -> tuple[EntryIndex, str]:
    """The offsets and sizes of a file's entries, and the file's fault: "", shard_truncated or
    text_after_list.

    A file that begins with `[` is a JSON list; it is truncated if the list is not closed. Any other
    file has an entry in each line that is not blank. An item of a list is the text between two of
    its commas, valid or not: reading it shows that.
    """

    def make() -> EntryIndex:
        spans, problem = _index_list(path) if is_list(path) else (_index_lines(path), "")
        return np.concatenate([spans, [[_PROBLEMS.index(problem), 0]]])  # the last row is no span

    table = cached_array(f"{identity(path)}-2", make)
    return table[:-1], _PROBLEMS[int(table[-1, 0])]


def is_list(path: str) -> bool:
    """Whether the first byte behind a byte order mark that is not blank opens a JSON list."""
    for _, chunk in _chunks(path, _mark(path)):
        if text := chunk.lstrip(_BLANK):
            return text.startswith(b"[")
    return False


def _mark(path: str) -> int:
    """The number of bytes of the byte order mark that some programs put before UTF-8."""
    with Path(path).open("rb") as file:
        return len(_MARK) if file.read(len(_MARK)) == _MARK else 0


def _chunks(path: str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    with Path(path).open("rb") as file:
        file.seek(offset)
        while chunk := file.read(_CHUNK):
            yield offset, chunk
            offset += len(chunk)


def _index_lines(path: str) -> EntryIndex:
    begin = _mark(path)
    edges = [np.array([begin], np.int64)]
    blank = []  # of each line, whether its first byte is
    starts = np.array([0])  # of lines that begin in this chunk
    for offset, chunk in _chunks(path, begin):
        data: npt.NDArray[np.uint8] = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(data == ord("\n")) + 1
        starts = np.concatenate([starts, ends])
        inside = starts < len(data)
        blank.append(_IS_BLANK[data[starts[inside]]])
        starts = starts[~inside] - len(data)
        edges.append(ends + offset)
    edges.append(np.array([Path(path).stat().st_size], np.int64))
    edge = np.concatenate(edges)
    spans = np.stack([edge[:-1], np.diff(edge)], axis=1)
    spans = spans[spans[:, 1] > 0]
    keep = np.ones(len(spans), bool)
    with Path(path).open("rb") as file:
        for row in np.flatnonzero(np.concatenate(blank)) if blank else ():
            file.seek(spans[row, 0])
            keep[row] = any(part.strip(_BLANK) for part in _parts(file, int(spans[row, 1])))
    return spans[keep]


def _parts(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (part := file.read(min(size, _CHUNK))):
        size -= len(part)
        yield part


def _index_list(path: str) -> tuple[EntryIndex, str]:
    """The entries of a JSON list that are whole, and the list's fault."""
    depth, in_string = 0, 0
    cuts = []  # offsets of the list's own bracket, of its commas, and of its end
    begun = whole = False
    carried = b""
    for offset, read in _chunks(path):
        chunk = carried + read
        start = offset - len(carried)
        # Keep a final run of backslashes for the next chunk, which decides its meaning.
        end = len(chunk.rstrip(_BACKSLASH))
        chunk, carried = chunk[:end], chunk[end:]
        if _BACKSLASH in chunk:
            # Backslashes form pairs from the left of their run. One that is left over escapes the
            # quote after it.
            chunk = chunk.replace(b"\\\\", b"..").replace(b'\\"', b"..")
        data: npt.NDArray[np.uint8] = np.frombuffer(chunk, np.uint8)
        places = np.flatnonzero(_STRUCTURE[data])
        kinds: npt.NDArray[np.uint8] = data[places]
        quotes = kinds == _QUOTE
        outside = ((np.cumsum(quotes) + in_string) % 2 == 0) & ~quotes
        in_string = (in_string + int(quotes.sum())) % 2
        places, kinds = places[outside], kinds[outside]
        depths = depth + np.cumsum(_STEP[kinds], dtype=np.int64)
        closing = np.flatnonzero(depths == 0)
        if len(closing):  # what follows the list is not part of it
            end = int(closing[0]) + 1
            places, kinds, depths = places[:end], kinds[:end], depths[:end]
            whole = True
        first = np.zeros(len(places), bool)
        if not begun and len(first):
            first[0] = begun = True  # the list's own bracket
        cuts.append(places[first | ((depths == 1) & (kinds == _COMMA)) | (depths == 0)] + start)
        if whole:
            break
        if len(depths):
            depth = int(depths[-1])
    edges = np.concatenate(cuts) if cuts else np.zeros(0, np.int64)
    spans = np.stack([edges[:-1] + 1, np.diff(edges) - 1], axis=1) if len(edges) > 1 else np.zeros((0, 2), np.int64)
    if len(spans) == 1 and whole:
        with Path(path).open("rb") as file:
            file.seek(spans[0, 0])
            if not file.read(min(int(spans[0, 1]), 1 << 20)).strip(_BLANK):
                spans = spans[:0]  # []
    return spans, _after(path, int(edges[-1]) + 1) if whole else "shard_truncated"


def _after(path: str, end: int) -> str:
    """text_after_list if something follows the list that ends at `end`, else ""."""
    with Path(path).open("rb") as file:
        file.seek(end)
        rest = Path(path).stat().st_size - end
        return "text_after_list" if any(part.strip(_BLANK) for part in _parts(file, rest)) else ""
