"""Where records come from. A kind of source is a module here, registered in `SOURCES`."""

from sphinx_pl.data.readers.base import (
    SOURCES,
    Shard,
    Source,
    build_source,
    check_options,
    config_key,
    expand_paths,
    spread,
)
from sphinx_pl.data.readers.folder import FolderSource
from sphinx_pl.data.readers.image_text import ImageTextSource
from sphinx_pl.data.readers.instructions import InstructionSource
from sphinx_pl.data.readers.looking import find_kind
from sphinx_pl.data.readers.table import TableSource
from sphinx_pl.data.readers.text import TextSource

__all__ = [
    "SOURCES",
    "FolderSource",
    "ImageTextSource",
    "InstructionSource",
    "Shard",
    "Source",
    "TableSource",
    "TextSource",
    "build_source",
    "check_options",
    "config_key",
    "expand_paths",
    "find_kind",
    "spread",
]
