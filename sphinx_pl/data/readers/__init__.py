"""Readers of sources. Each kind of source is a module here that registers its reader in `READERS`."""

from sphinx_pl.data.readers.base import (
    READERS,
    Reader,
    Shard,
    build_reader,
    check_options,
    config_key,
    expand_paths,
    spread,
)
from sphinx_pl.data.readers.folder import FolderReader
from sphinx_pl.data.readers.image_text import ImageTextReader
from sphinx_pl.data.readers.instructions import InstructionReader
from sphinx_pl.data.readers.looking import find_kind
from sphinx_pl.data.readers.table import TableReader
from sphinx_pl.data.readers.text import TextReader

__all__ = [
    "READERS",
    "FolderReader",
    "ImageTextReader",
    "InstructionReader",
    "Reader",
    "Shard",
    "TableReader",
    "TextReader",
    "build_reader",
    "check_options",
    "config_key",
    "expand_paths",
    "find_kind",
    "spread",
]
