"""The kind of a source, found by looking at its files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from sphinx_pl.data.files import PACKED, is_remote, local_file
from sphinx_pl.data.readers.annotation import json_object, read
from sphinx_pl.data.readers.base import READERS, config_key, expand_paths, spread
from sphinx_pl.data.readers.instruction_json import image_names
from sphinx_pl.data.readers.line_index import index_entries
from sphinx_pl.data.readers.table import NAMES, asks_without_images, names_picture
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import user_path

LOOKED_AT = 64
_BY_NAME = {"tar": "image_text", "csv": "table", "tsv": "table", "parquet": "text", "txt": "text", "md": "text"}
_BY_NAME |= {"tgz": "image_text"}
_INSTRUCTION = {"conversations", "messages", "task", "regions", "choices"}
_IMAGE = {"img"}
"""Keys that may be meant as an entry's image, but are not read."""


def find_kind(name: str, path: str | Sequence[str], section: str = "sources") -> tuple[str, str]:
    """The kind and the modality of a source, by the extension of its first file and, for json, its
    first entries.

    Raises:
        UserError: there is no such file, or its kind is unknown.
    """
    first = path if isinstance(path, str) else path[0] if isinstance(path, Sequence) and path else None
    if isinstance(first, str) and first and os.path.isdir(user_path(first)):  # noqa: PTH112 - pathlib's may raise
        return "folder", "image"
    urls = expand_paths(name, path)
    url, extension, key = urls[0], _extension(urls[0]), config_key(name, section)
    kinds = {_BY_NAME.get(end, "json"): end for end in map(_extension, urls)}
    if len(kinds) > 1 and not kinds.keys() <= {"table", "json"} and not kinds.keys() <= {"text", "json"}:
        raise UserError(
            f"{key}.path: files of several kinds ({', '.join(sorted(kinds.values()))}): make a source of each kind, or "
            f"set {key}.kind"
        )
    if extension in _BY_NAME:
        kind = _BY_NAME[extension]
        if extension == "parquet":
            _check_only_text(f"{key}.path={url}", _columns(url), key)
        only_text = kind == "text" or (kind == "table" and not is_remote(url) and asks_without_images(url))
        return kind, "text" if only_text else "image"
    if extension not in ("json", "jsonl", "ndjson") or is_remote(url):
        raise UserError(f"{key}.path={url}: its name does not say what it is: set {key}.kind={'|'.join(READERS)}")
    entries, problem = _entries(url)
    if not entries:
        raise UserError(f"{key}.path={url}: none of its entries can be read ({problem or 'there is none'})")
    keys = {item for entry in entries for item in entry}
    has_images = any(image_names(entry) or any(entry.get(name) for name in _IMAGE) for entry in entries)
    if keys & _INSTRUCTION or {"question", "answer"} <= keys:
        return "instructions", "image" if has_images else "text"
    if keys & set(NAMES["image"]) and keys & set(NAMES["caption"]):
        return "table", "image"
    if "text" in keys:
        _check_only_text(f"{key}.path={url}", [item for item in keys if any(entry.get(item) for entry in entries)], key)
        return "text", "text"
    raise UserError(
        f"{key}.path={url}: entries with the keys {json.dumps(sorted(keys))} are no kind of source: they need "
        "conversations, or question and answer, or image and caption, or text"
    )


def _extension(url: str) -> str:
    plain = url.lower()
    if not plain.endswith(".tgz"):
        for packing in PACKED:
            plain = plain.removesuffix(packing)
    return plain.rpartition(".")[2]


def _check_only_text(where: str, columns: Iterable[str], key: str) -> None:
    """Raises: UserError: a column that is not read may hold pictures."""
    if pictures := sorted(filter(names_picture, columns)):
        raise UserError(
            f"{where}: its column '{pictures[0]}' may hold pictures, of which a file like this gives none: write them "
            f"to files and name these in a csv or jsonl (docs/own_data.md), or take the text alone with {key}.kind=text"
        )


def _columns(url: str) -> list[str]:
    """The columns of a parquet file; none if the file is damaged, which shows when it is read."""
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(local_file(url)[0]).names)
    except Exception:  # pyarrow raises nearly anything
        return []


def _entries(url: str) -> tuple[list[dict[str, Any]], str]:
    """Some entries of a file, and why another one cannot be read ("" if all can)."""
    path, _ = local_file(url)
    spans, problem = index_entries(path)
    entries = []
    for offset, size in spans[spread(len(spans), LOOKED_AT)].tolist():
        try:
            entries.append(json_object(read(path, offset, size, url), url))
        except SkipSample as bad:
            problem = problem or str(bad)
    return entries, problem
