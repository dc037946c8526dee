"""Documents of plain text for co-training: jsonl (also .gz, .zst), parquet, or one .txt a document."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sphinx_pl.data.files import (
    PACKED,
    CacheFile,
    Hold,
    cache_folder,
    cached_array,
    identity,
    in_cache,
    is_remote,
    local_file,
    prune,
)
from sphinx_pl.data.readers.annotation import check_unicode, decoded, json_object, read
from sphinx_pl.data.readers.base import READERS, Reader, Shard
from sphinx_pl.data.readers.line_index import EntryIndex, index_entries
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS


class TextReader(Reader):
    """Reads documents: the object of a line, the row of a table, or a whole `.txt` or `.md`. All
    text is supervised.

    Args:
        column: the key or column that holds the text ("content" in RefinedWeb's parquet files).
    """

    def __init__(self, name: str, path: str | Sequence[str], task: str = "text", column: str = "text") -> None:
        super().__init__(name, path)
        self.task = TASKS[task].name
        self.column = column

    def _open(self, number: int) -> Shard:
        return _TextShard(self, self.urls[number], self.shard_names[number])

    def count(self, number: int) -> int | None:
        url = self.urls[number]
        if is_remote(url) or not url.endswith(".parquet"):
            return None
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(url).num_rows)
        except Exception:  # damaged files make pyarrow raise nearly anything
            return None


class _TextShard(Shard):
    def __init__(self, source: TextReader, url: str, name: str) -> None:
        super().__init__()
        self.source = source
        self.name = name
        self.path, whole = local_file(url)
        self.is_plain = _is_parquet(self.path)
        problem = ""
        if self.is_plain:
            self.path, self.spans = _column(self.path, source.column)
        elif is_document(url):
            self.is_plain = True
            self.spans = np.array([[0, Path(self.path).stat().st_size]], np.int64)
        else:
            self.spans, problem = index_entries(self.path)
        self._hold = Hold(self.path)
        if not whole or problem:
            self.skip(problem or "shard_truncated", f"{url}: the documents before it are used")

    def __len__(self) -> int:
        return len(self.spans)

    def images(self, index: int) -> object:
        return None

    def record(self, index: int) -> Record:
        key = f"{self.name}:{index}"
        offset, size = self.spans[index].tolist()
        data = read(self.path, offset, size, key)
        text: Any = decoded(data, "text", key) if self.is_plain else json_object(data, key).get(self.source.column)
        if not isinstance(text, str) or not text.strip():
            raise SkipSample("text_empty", key)
        check_unicode(text, "text", key)
        return Record(key=key, task=self.source.task, answer=text)


def is_document(url: str) -> bool:
    """Whether a file is one document, not a list of documents."""
    name = url.lower()
    for packing in PACKED:
        name = name.removesuffix(packing)
    return name.endswith((".txt", ".md"))


def _is_parquet(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(4) == b"PAR1"


def _column(path: str, column: str) -> tuple[str, EntryIndex]:
    """A file with a table's text column, and the rows' offsets and sizes in it. So a row is read
    without its row group.

    Raises:
        SkipSample: shard_unreadable, column_absent.
    """
    # A column's name may hold anything.
    name = f"{identity(path)}-{zlib.crc32(column.encode('utf-8', 'surrogatepass')):08x}"
    texts = cache_folder("files") / name

    def make() -> EntryIndex:
        ends = array("q", [0])
        with CacheFile(texts) as file:
            for value in _values(path, column):
                ends.append(ends[-1] + file.write(value))
            file.keep()
        return np.asarray(ends, dtype=np.int64)

    ends = cached_array(name, make)
    if not in_cache(texts):  # it was deleted from the cache, but the index was not
        make()
    prune(keep=texts)
    return str(texts), np.stack([ends[:-1], np.diff(ends)], axis=1)


def _values(path: str, column: str) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if column not in table.schema_arrow.names:
                raise SkipSample("column_absent", f"{path} has no column '{column}': {table.schema_arrow.names}")
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).cast(pyarrow.binary()):
                    yield value.as_py() or b""
    except (SkipSample, GeneratorExit):
        raise
    except Exception as error:  # as above
        raise SkipSample("shard_unreadable", f"{path}: {error}") from None


READERS.register("text", TextReader)
