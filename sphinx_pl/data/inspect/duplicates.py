"""Finds image-text pairs that say the same as an earlier one, for `filters.duplicates`.

The result is a sorted array of the hashes of their keys (8 bytes each), mapped by every process
that filters. It is made holding 16 bytes a pair, and belongs to the path setting that it was made
from: keys are relative to its common folder.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sphinx_pl.data.images import read_bytes
from sphinx_pl.data.readers import build_reader
from sphinx_pl.data.readers.filters import key_hash
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import whole_file

IMAGE, CAPTION = "image", "caption"
"""Values by which pairs compare, besides a column of their json such as sha256 or url."""


def find_duplicates(
    path: str | list[str], by: str, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[int, int, int]:
    """Write the hashes of all pairs whose `by` equals that of an earlier one.

    Earlier is by file and place in it, before any filter: the result does not depend on how the
    pairs are read later. Pairs that are broken, or have no such column, are equal to none.

    Returns:
        How many pairs there are, how many of them could not be compared, and how many are
            duplicates.

    Args:
        by: "image" (the stored bytes), "caption", or a column of the json.
        progress: called with shards done and shards in all.

    Raises:
        UserError: no file is there, or no pair has the column.
    """
    if out.suffix != ".npy":
        raise UserError(f"out={out} must end in .npy")
    if not out.parent.is_dir():
        raise UserError(f"out={out}: there is no folder {out.parent}: make it first")
    source = build_reader("image_text", "pairs", path, filters={"max_chars": 1 << 30})
    contents, keys = array("Q"), array("Q")
    pairs = 0
    for number in range(len(source.urls)):
        try:
            shard = source.open(number)
        except SkipSample as bad:
            raise UserError(
                f"{source.urls[number]} cannot be read ({bad.reason}): a result without it would have holes"
            ) from None
        for index in range(len(shard)):
            pairs += 1
            try:
                record = shard.record(index)
                content = _content(record, by)
            except SkipSample:
                continue
            if content is not None:
                contents.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()))
                keys.append(key_hash(record.key))
        progress(number + 1, len(source.urls))
    if not keys:
        raise UserError(f"by={by}: none of {pairs} pairs has it: use {IMAGE}, {CAPTION} or a column of their json")
    _, first = np.unique(np.asarray(contents), return_index=True)
    later = np.ones(len(keys), bool)
    later[first] = False
    duplicates = np.sort(np.asarray(keys)[later])
    with whole_file(out) as temporary, temporary.open("wb") as file:
        np.save(file, duplicates)
    return pairs, pairs - len(keys), len(duplicates)


def _content(record: Record, by: str) -> bytes | None:
    if by == IMAGE:
        return read_bytes(record.images[0])
    value = record.answer if by == CAPTION else record.meta.get(by)
    return None if value is None else str(value).encode("utf-8", "surrogateescape")
