"""Instruction data: LLaVA's format and similar ones, as JSON lists or jsonl (also .gz, .zst)."""

from __future__ import annotations

import hashlib
import reprlib
import zlib
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sphinx_pl.data.files import Hold, cached_array, identity, is_remote, local_file
from sphinx_pl.data.readers.annotation import json_object, read
from sphinx_pl.data.readers.base import READERS, Reader, Shard, config_key, listed
from sphinx_pl.data.readers.instruction_json import image_names, to_record
from sphinx_pl.data.readers.line_index import index_entries, is_list
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import user_path

EntryNumbers = npt.NDArray[np.int64]
MAX_ID = 200


class InstructionReader(Reader):
    """Reads entries as `sphinx_pl.data.readers.instruction_json` describes them.

    An entry without "task" has the task of the option `task`.

    Args:
        root: folder that image paths are relative to; by default that of the (first) instruction
            file.
        tasks: only entries of these tasks.
        where: only entries whose meta has these values.
        ratio: only this share of each file's entries; the random choice is always the same.
        ignore_keys: unknown keys of entries to ignore; other unknown keys skip their entry.
    """

    def __init__(
        self,
        name: str,
        path: str | Sequence[str],
        root: str | None = None,
        task: str = "chat",
        tasks: Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
        ratio: float = 1.0,
        ignore_keys: Sequence[str] = (),
    ) -> None:
        super().__init__(name, path)
        if root is None and is_remote(self.urls[0]):
            raise UserError(f"source '{name}' reads {self.urls[0]}: say with root=FOLDER where its images lie")
        if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise UserError(f"source '{name}': ratio={ratio} must be above 0 and at most 1")
        self.root = user_path(root) if root is not None else Path(self.urls[0]).parent
        self.task = TASKS[task].name
        wanted = None if tasks is None else listed(tasks, f"{config_key(name)}.tasks")
        self.tasks = None if wanted is None else frozenset(TASKS[task].name for task in wanted)
        self.where = dict(where or {})
        self.ratio = ratio
        self.ignore_keys = listed(ignore_keys, f"{config_key(name)}.ignore_keys")

    def _open(self, number: int) -> Shard:
        return _InstructionShard(self, self.urls[number], self.shard_names[number])

    def folder_hint(self, key: str) -> str:
        return f"image paths are relative to {self.root}; {key}.root sets another folder"

    def hint(self) -> str:
        filters = {"tasks": sorted(self.tasks or ()), "where": self.where}
        given = [f"{key}={value}" for key, value in filters.items() if value]
        return f" with {', '.join(given)}" if given else ""


class _InstructionShard(Shard):
    def __init__(self, source: InstructionReader, url: str, name: str) -> None:
        super().__init__()
        self.source = source
        self.name = name
        self.path, whole = local_file(url)
        self._hold = Hold(self.path)
        if url.endswith((".json", ".json.gz", ".json.zst")) and not is_list(self.path):
            raise UserError(f"source '{source.name}': {url} is not a JSON list of entries: see docs/configuration.md")
        self._identity = identity(self.path)
        self.spans, problem = index_entries(self.path)
        if not whole or problem:
            self.skip(problem or "shard_truncated", f"{url}: the entries before it are used")
        self.rows = self._rows()

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        row = int(self.rows[index])
        key = f"{self.name}:{row}"
        entry = self._entry(row)
        if isinstance(entry.get("id"), str | int):
            # The id is for people: it need not be unique, may be very long, and JSON can spell what
            # is no Unicode.
            key = f"{key}:{str(entry['id'])[:MAX_ID]}".encode("utf-8", "replace").decode()
        return to_record(entry, key, self.source.root, self.source.task, self.source.ignore_keys)

    def images(self, index: int) -> object:
        return int(self._image_hashes[self.rows[index]]) or None

    def _entry(self, row: int) -> dict[str, Any]:
        key = f"{self.name}:{row}"
        offset, size = self.spans[row].tolist()
        return json_object(read(self.path, offset, size, key), key)

    @cached_property
    def _image_hashes(self) -> EntryNumbers:
        """A number for the images of each entry, 0 without images. It is cached, since it takes
        reading everything."""

        def make() -> EntryNumbers:
            hashes = array("q", (self._image_hash(row) for row in range(len(self.spans))))
            return np.asarray(hashes, dtype=np.int64)

        return cached_array(f"{self._identity}-images-2", make)

    def _image_hash(self, row: int) -> int:
        try:
            images = image_names(self._entry(row))
        except SkipSample:  # it is counted when it is drawn
            return 0
        # Making the whole record would take four times as long. A malformed entry is skipped later.
        names = str(images[0] if len(images) == 1 else images).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(names, digest_size=8).digest(), signed=True) if images else 0

    def _rows(self) -> EntryNumbers:
        rows = np.arange(len(self.spans))
        source = self.source
        if source.ratio < 1:
            rng = np.random.default_rng(zlib.crc32(self.name.encode()))
            rows = np.sort(rng.permutation(rows)[: round(len(rows) * source.ratio)])
            if left := len(self.spans) - len(rows):
                self.unused["ratio"] += left
        if source.tasks is None and not source.where:
            return rows
        kept = array("q")
        for row in rows.tolist():
            try:
                entry = self._entry(row)
            except SkipSample as bad:
                self.skip(bad.reason, bad.detail)
                continue
            task, meta = entry.get("task", source.task), entry.get("meta")
            if not isinstance(task, str):
                self.skip("entry_malformed", f"{self.name}:{row}: its task is {reprlib.repr(task)}")
            elif source.tasks is not None and task not in source.tasks:
                self.leave("tasks", f"{self.name}:{row}: {task}")
            elif all(isinstance(meta, dict) and meta.get(wanted) == value for wanted, value in source.where.items()):
                kept.append(row)
            else:
                has = {wanted: meta.get(wanted) for wanted in source.where} if isinstance(meta, dict) else "no meta"
                self.leave("where", f"{self.name}:{row}: {reprlib.repr(has)}")
        return np.asarray(kept, dtype=np.int64)


READERS.register("instructions", InstructionReader)
