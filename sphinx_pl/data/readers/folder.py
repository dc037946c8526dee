"""Folders of pictures with captions in files beside them, in a table, or in their names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from sphinx_pl.data.readers.annotation import decoded, json_object, read
from sphinx_pl.data.readers.base import READERS, Shard, config_key
from sphinx_pl.data.readers.pairs import IMAGES, Members, PairShard, split_name
from sphinx_pl.data.readers.table import TableReader, TableShard
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.utils.errors import UserError, suggest

TABLES = tuple(f"{stem}.{end}" for stem in ("metadata", "captions") for end in ("csv", "tsv", "jsonl"))
"""Files at the top of the folder that name its pictures, as in Hugging Face's imagefolder."""
CAPTIONS = ("auto", "files", "names")


class FolderReader(TableReader):
    """Reads all pictures of a folder and of the folders in it.

    Args:
        captions: files takes `NAME.txt` (or `.json` with "caption") beside each picture. names
            takes the file's name with spaces for `_`. auto takes one of `TABLES` at the top of the
            folder, else files.
    """

    folders = True

    def __init__(
        self,
        name: str,
        path: str | Sequence[str],
        captions: str = "auto",
        task: str | None = None,
        filters: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        encoding: str = "utf-8",
        ignore_columns: Sequence[str] = (),
    ) -> None:
        super().__init__(name, path, task, filters, None, columns, encoding, ignore_columns)
        if captions not in CAPTIONS:
            raise UserError(f"{config_key(name)}.captions={captions}: {suggest(captions, CAPTIONS)}")
        self.captions = captions

    def _open(self, number: int) -> Shard:
        folder, name = Path(self.urls[number]), self.shard_names[number]
        names = sorted(_files(folder))
        if self.captions == "names":
            return _NamedShard(self, folder, name, names)
        for table in TABLES if self.captions == "auto" else ():
            if table in names:
                return _ListedShard(self, folder, name, names, table)
        return _FilesShard(self, folder, name, names)

    def folder_hint(self, key: str) -> str:
        return f"pictures are looked for in {self.urls[0]}"


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder, by their paths in it.

    Links to folders are followed. What can be reached in two ways, as in a loop of links, is there
    once.
    """
    visited = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort(key=lambda name: (os.path.islink(f"{where}/{name}"), name))  # noqa: PTH114
        for file in files:
            yield (Path(where) / file).relative_to(folder).as_posix()


class _ListedShard(TableShard):
    """The rows of a table in the folder. A picture that the table does not name is counted."""

    def __init__(self, source: FolderReader, folder: Path, name: str, names: Sequence[str], table: str) -> None:
        super().__init__(source, str(folder / table), f"{name}/{table}", folder)
        listed = set()
        for index in range(len(self)):
            listed.add(normalize("NFC", str(self.images(index))))
        for file in names:
            key, extension = split_name(file)
            if file == table or normalize("NFC", file) in listed:
                continue
            if key.rpartition("/")[2].startswith("."):
                self.leave("hidden", file)
            elif extension in IMAGES:
                self.skip("caption_absent", f"{file} is not in {table}")
            else:
                self.leave(extension if extension.isalpha() else "other", file)


class _FilesShard(PairShard):
    """Pictures with a file of the same name."""

    def __init__(self, source: FolderReader, folder: Path, name: str, names: Sequence[str]) -> None:
        super().__init__()
        self.source = source
        self.folder = folder
        self.name = name
        self.names = names
        members = Members(self)
        for number, file in enumerate(names):
            members.add(file, number, (folder / file).stat().st_size if (folder / file).is_file() else 0)
        self.keys, self.spans = members.samples()
        if not len(self.keys) and self.skipped["caption_absent"]:
            raise UserError(
                f"{folder} has {self.skipped['caption_absent']} pictures without a caption: put NAME.txt beside "
                "NAME.jpg, or a metadata.csv with the columns file_name and text into the folder, or take the files' "
                f"names with {config_key(source.name)}.captions=names"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def record(self, index: int) -> Record:
        key = f"{self.name}/{self.keys[index].decode('utf-8', 'replace')}"
        image, text, _ = self.spans[index].tolist()
        columns = self.columns(index)
        caption = decoded(self._read(text, key), "caption", key) if text[1] >= 0 else columns.get("caption")
        return self.source.pair(key, ImageRef(str(self.folder / self.names[image[0]])), caption, columns)

    def columns(self, index: int) -> Mapping[str, Any]:
        note = self.spans[index][2].tolist()
        key = f"{self.name}/{self.names[note[0]]}"
        return json_object(self._read(note, key), key) if note[1] >= 0 else {}

    def _read(self, member: Sequence[int], key: str) -> bytes:
        return read(str(self.folder / self.names[member[0]]), 0, member[1], key)


class _NamedShard(PairShard):
    """Pictures whose names say what they show."""

    def __init__(self, source: FolderReader, folder: Path, name: str, names: Sequence[str]) -> None:
        super().__init__()
        self.source = source
        self.folder = folder
        self.name = name
        self.pictures = []
        for file in names:
            key, extension = split_name(file)
            if key.rpartition("/")[2].startswith("."):
                self.leave("hidden", file)
            elif extension in IMAGES:
                self.pictures.append(file)
            else:
                self.leave(extension if extension.isalpha() else "other", file)

    def __len__(self) -> int:
        return len(self.pictures)

    def record(self, index: int) -> Record:
        file = self.pictures[index]
        caption = split_name(file)[0].rpartition("/")[2].replace("_", " ")
        return self.source.pair(f"{self.name}/{file}", ImageRef(str(self.folder / file)), caption, {})

    def columns(self, index: int) -> Mapping[str, Any]:
        return {}


READERS.register("folder", FolderReader)
