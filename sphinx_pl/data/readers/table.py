"""Tables (csv, tsv, jsonl): rows with an image and its caption, or a question, its answer and
perhaps an image."""

from __future__ import annotations

import csv
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from sphinx_pl.data.files import CacheFile, Hold, cache_folder, cached_array, identity, in_cache, is_remote, local_file
from sphinx_pl.data.readers.annotation import MAX_BYTES, check_unicode, json_object, read
from sphinx_pl.data.readers.base import READERS, Shard, config_key, listed, spread
from sphinx_pl.data.readers.line_index import EntryIndex, index_entries
from sphinx_pl.data.readers.pairs import IMAGES, PairReader, PairShard, split_name
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import user_path

NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "file_name", "filename", "file", "image_path", "path", "img", "picture", "photo"),
    "caption": ("caption", "text", "description", "title"),
    "question": ("question", "prompt", "query", "instruction"),
    "answer": ("answer", "response", "output", "completion"),
}
"""The names of columns in common files, in any case. A table's first one is read."""
_NEEDED = (("image", "caption"), ("question", "answer"))
_DELIMITERS = ",;\t|"
_SEPARATOR_LINE = re.compile(rf"\"?sep=([{_DELIMITERS}])\"?\s*", re.IGNORECASE)
_NO_TEXT = re.compile(r"[\0\udc80-\udcff]")
"""A zero byte, or a byte that is not of the encoding."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_PICTURE = re.compile(r"(?:^|[_ -])(?:image|img|picture|photo|pic)s?(?:$|[_ -]|\d)", re.IGNORECASE)
_ANOTHER = re.compile(r"(?:image|img|picture|photo|pic)(?:s|[_ -]?\d+)$", re.IGNORECASE)
_UNSEEN = re.compile("video|audio|speech", re.IGNORECASE)
_OPTIONS = re.compile(r"choices?|options?|(?:choice|option)[_ -]?[a-z0-9]|[a-d]", re.IGNORECASE)
_OTHERS = frozenset({"task", "system", "regions", "conversations", "messages"})


def names_picture(column: str) -> bool:
    """Whether a column's name says that it holds pictures, or something else to look at or hear."""
    return _PICTURE.search(column) is not None or _UNSEEN.search(column) is not None


class TableReader(PairReader):
    """Reads tables. The first row of a csv or tsv names the columns; a line of a jsonl is an
    object.

    Args:
        task: the records' task; by default caption, or chat for questions and answers.
        root: folder that image paths are relative to; by default that of the (first) file.
        columns: the columns of image, caption, question and answer that `NAMES` does not have.
        encoding: the encoding of a csv or tsv without a byte order mark.
        ignore_columns: columns to ignore; others that may hold a picture or options are refused.
    """

    def __init__(
        self,
        name: str,
        path: str | Sequence[str],
        task: str | None = None,
        filters: Mapping[str, Any] | None = None,
        root: str | None = None,
        columns: Mapping[str, str] | None = None,
        encoding: str = "utf-8",
        ignore_columns: Sequence[str] = (),
    ) -> None:
        super().__init__(name, path, task or "caption", filters)
        self.ignore_columns = listed(ignore_columns, f"{config_key(name)}.ignore_columns")
        self.own_task = TASKS[task].name if task is not None else None
        self.named_columns = dict(columns or {})
        for role in self.named_columns:
            if role not in NAMES:
                raise UserError(f"{config_key(name)}.columns.{role}: {suggest(role, NAMES)}")
        self.encoding = encoding
        try:
            "".encode(encoding)
        except (LookupError, TypeError):
            raise UserError(f"{config_key(name)}.encoding={encoding} is none that Python knows") from None
        if root is None and is_remote(self.urls[0]):
            raise UserError(f"source '{name}' reads {self.urls[0]}: say with root=FOLDER where its images lie")
        self.root = user_path(root) if root is not None else Path(self.urls[0]).parent

    def _open(self, number: int) -> Shard:
        return TableShard(self, self.urls[number], self.shard_names[number], self.root)

    def folder_hint(self, key: str) -> str:
        return f"image paths are relative to {self.root}; {key}.root sets another folder"


class TableShard(PairShard):
    """The rows of one file.

    Args:
        source: the reader with the options; a folder of pictures has such a file too.
        root: folder that image paths are relative to.

    Raises:
        UserError: the columns do not make a record.
    """

    def __init__(self, source: TableReader, url: str, name: str, root: Path) -> None:
        super().__init__()
        self.source = source
        self.name = name
        self.root = root
        self.path, whole = local_file(url)
        self.header: list[str] | None = None
        if is_json(url):
            self.spans, problem = index_entries(self.path)
            names = self._keys()
        else:
            self.path, spans, problem = _rows(self.path, source.encoding)
            self.header = list(map(str.strip, self._object(spans[0], url)["row"])) if len(spans) else []
            self.spans = spans[1:]
            names = self.header
        self._hold = Hold(self.path)
        if not whole or problem:
            self.skip(problem or "shard_truncated", f"{url}: the rows before it are used")
        self.roles = self._roles(url, names)

    def _keys(self) -> list[str]:
        """The keys of some of the objects."""
        names: dict[str, None] = {}
        for index in spread(len(self), 64):
            try:
                names |= dict.fromkeys(self.columns(index))
            except SkipSample:
                continue
        return list(names)

    def _roles(self, url: str, columns: Sequence[str]) -> dict[str, str]:
        """Role (image, caption, question, answer) -> column."""
        lower = {name.lower(): name for name in reversed(columns)}
        roles = {role: lower[name] for role, names in NAMES.items() for name in names[::-1] if name in lower}
        key = config_key(self.source.name)
        for role, name in self.source.named_columns.items():
            if name not in columns:
                raise UserError(f"{key}.columns.{role}={name}: {url} has no such column: {suggest(name, columns)}")
            roles[role] = name
        if twice := [name for name in roles.values() if columns.count(name) > 1]:
            raise UserError(f"{url} has two columns '{twice[0]}': rename one of them")
        complete = any(set(needed) <= set(roles) for needed in _NEEDED)
        if not complete and any(_NO_TEXT.search(name) for name in columns):
            raise UserError(
                f"{url}: its first row is no text in {self.source.encoding}: save the table as CSV UTF-8, or set "
                f"{key}.encoding"
            )
        if len(self) and not complete:
            raise UserError(
                f"{url} has the columns {', '.join(columns) or '(none)':.300}: a source needs image and caption, or "
                f"question and answer; say which they are with {key}.columns={{image: ..., caption: ...}}"
            )
        asks = {"question", "answer"} <= set(roles)
        for name in columns:
            if name in roles.values() or name in self.source.ignore_columns or not self._filled(name):
                continue
            advice = ""
            if _UNSEEN.search(name):
                advice = "the model sees images only"
            elif "image" not in roles and (_PICTURE.search(name) or self._pictures(name)):
                advice = f"read it with {key}.columns={{image: {name}}}"
            elif _ANOTHER.match(name) or (asks and (name.lower() in _OTHERS or _OPTIONS.fullmatch(name))):
                advice = "a file of instructions can have it (docs/data.md)"
            if advice:
                raise UserError(
                    f"{url}: the column '{name}' is not read, and what is read may be about it: {advice}, or pass it "
                    f"over with {key}.ignore_columns=[{name}]"
                )
        return roles

    def _some(self, name: str) -> Iterator[Any]:
        for index in spread(len(self), 64):
            try:
                yield self.columns(index).get(name)
            except SkipSample:
                continue

    def _filled(self, name: str) -> bool:
        """Whether the column has a value in some of the rows."""
        return any(value not in (None, "", [], {}) for value in self._some(name))

    def _pictures(self, name: str) -> bool:
        """Whether some values of the column are names of pictures."""
        return any(isinstance(value, str) and split_name(value)[1] in IMAGES for value in self._some(name))

    def __len__(self) -> int:
        return len(self.spans)

    def columns(self, index: int) -> Mapping[str, Any]:
        key = f"{self.name}:{index}"
        row = self._object(self.spans[index], key)
        if self.header is None:
            return row
        fields = row["row"]
        if len(fields) != len(self.header):
            raise SkipSample("row_malformed", f"{key}: {len(fields)} fields, the first row has {len(self.header)}")
        return {name: _value(name, field) for name, field in zip(self.header, fields, strict=True)}

    def _object(self, span: Any, key: str) -> dict[str, Any]:
        return json_object(read(self.path, int(span[0]), int(span[1]), key), key)

    def record(self, index: int) -> Record:
        key = f"{self.name}:{index}"
        row = self.columns(index)
        value = {role: row.get(column) for role, column in self.roles.items()}
        images = self._images(value.get("image"), key)
        rest = {name: row[name] for name in row if name not in self.roles.values()}
        if "question" not in self.roles or "answer" not in self.roles:
            if not images:
                raise SkipSample("image_absent", f"{key}: no image in the column {self.roles['image']}")
            return self.source.pair(key, images[0], value["caption"], rest | {"caption": value["caption"]}, row)
        texts = {}
        for role in ("question", "answer"):
            if not isinstance(text := value[role], str) or not text.strip():
                raise SkipSample(f"{role}_empty", key)
            check_unicode(text, role, key)
            texts[role] = text.strip()
        record = Record(
            key=key,
            task=self.source.own_task or "chat",
            images=images,
            question=texts["question"],
            answer=texts["answer"],
            meta=rest | ({"caption": value["caption"]} if "caption" in value else {}),
        )
        self.source.filters.check(record, row)
        return record

    def _images(self, name: Any, key: str) -> tuple[ImageRef, ...]:
        if name is None or name == "":
            return ()
        if not isinstance(name, str):
            raise SkipSample("entry_malformed", f"{key}: its image is no path")
        if _URL.match(name):
            raise SkipSample("image_is_url", f"{key}: {name:.200} has to be downloaded first")
        return (ImageRef(str(self.root / _path(name))),)

    def images(self, index: int) -> object:
        try:
            name = self.columns(index).get(self.roles.get("image", "")) or None
        except SkipSample:
            return None
        return _path(name) if isinstance(name, str) else name


def _value(column: str, field: str) -> Any:
    """The value of a field of a csv: None for a blank field, and numbers for sizes."""
    if column in ("width", "height"):
        with suppress(ValueError):
            return float(field)
    return field if field.strip() else None


def _path(name: str) -> str:
    return name.strip().replace("\\", "/").removeprefix("./")


def asks_without_images(url: str) -> bool:
    """Whether the first row of a csv names a question and an answer, and no image."""
    path, _ = local_file(url)
    try:
        with _text(path, "utf-8") as text:
            header = {name.strip().lower() for name in next(_csv_rows(text), [])}
    except (csv.Error, UnicodeError, _UnclosedError):
        return False
    return all(header.intersection(NAMES[role]) for role in ("question", "answer")) and not (
        header.intersection(NAMES["image"]) or any(map(names_picture, header))
    )


def is_json(url: str) -> bool:
    return Path(url.lower().removesuffix(".gz").removesuffix(".zst")).suffix in (".json", ".jsonl", ".ndjson")


def _rows(path: str, encoding: str) -> tuple[str, EntryIndex, str]:
    """A file with each row as JSON, the offsets and sizes of the rows in it, and the fault of the
    csv ("" if none)."""
    name = f"{identity(path)}-csv-{re.sub(r'[^A-Za-z0-9]', '_', encoding)}"
    rows = cache_folder("files") / name
    problems = ("", "quote_unclosed", "table_unreadable")

    def make() -> EntryIndex:
        ends = array("q", [0])
        problem = ""
        with CacheFile(rows) as file, _text(path, encoding) as text:
            try:
                for row in _csv_rows(text):
                    ends.append(ends[-1] + file.write(json.dumps({"row": row}).encode()))
            except _UnclosedError:
                problem = "quote_unclosed"
            except (csv.Error, UnicodeError):
                problem = "table_unreadable"
            file.keep()
        return np.concatenate([np.asarray(ends, np.int64), [problems.index(problem)]])

    numbers = cached_array(name, make)
    if not in_cache(rows):  # deleted from the cache; the index was not
        make()
    ends = numbers[:-1]
    return str(rows), np.stack([ends[:-1], np.diff(ends)], axis=1), problems[int(numbers[-1])]


class _UnclosedError(Exception):
    pass


def _text(path: str, encoding: str) -> TextIO:
    with Path(path).open("rb") as file:
        start = file.read(3)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif start == b"\xef\xbb\xbf":
        encoding = "utf-8-sig"
    # A caption in another encoding is then no text, and is counted by itself.
    errors = "surrogateescape" if encoding.replace("_", "-").lower() in ("utf-8", "utf8", "utf-8-sig") else "strict"
    return Path(path).open(encoding=encoding, errors=errors, newline="")


def _csv_rows(file: TextIO) -> Iterator[list[str]]:
    """The rows that are not blank. The delimiter is the one that Excel's line `sep=;` names, or the
    one that occurs most often in the first row."""
    first = file.readline()
    if match := _SEPARATOR_LINE.fullmatch(first):
        delimiter = match[1]
    else:
        file.seek(0)
        delimiter = max(_DELIMITERS, key=first.count)
    csv.field_size_limit(MAX_BYTES)
    lines: list[str] = []

    def fed() -> Iterator[str]:
        for line in file:
            lines.append(line)
            yield line

    before: list[str] | None = None
    spanning: list[str] = []
    for row in csv.reader(fed(), delimiter=delimiter):
        if before:
            yield before
        before, spanning = row, lines.copy()
        lines.clear()
    # A quote that is never closed takes all later rows into one field.
    if len(spanning) > 1 and "".join(spanning).count('"') % 2:
        raise _UnclosedError
    if before:
        yield before


READERS.register("table", TableReader)
