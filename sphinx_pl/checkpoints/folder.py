"""The files beside a model's tensors, and how a folder comes into place as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_pointer, replaced

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.model"
PROVENANCE = "provenance.json"
UNUSED = "unused.safetensors"


# -- reading ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        UserError: the file is missing or damaged, or holds something else than an object.
    """
    check_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing: copy the checkpoint again, whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): restore the file from its source") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' does not hold a JSON object: restore the file from its source")
    return content


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a folder in any layout; {} if another program wrote the folder."""
    return read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard, from an index. A shard is a file beside the index, never a path to
    another place.

    Raises:
        UserError: the index is damaged.
    """
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values())
    ):
        raise UserError(f"'{path}' has no weight_map: restore the file from its source")
    return weight_map


@contextmanager
def sizes_of(file: Path) -> Iterator[None]:
    """Turns the errors of a size that `file` lacks, or that is no size, into one line.

    Raises:
        UserError: there was one.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(f"'{file}' lacks {error}: restore the file from its source") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"'{file}' has a size that cannot be ({error}): restore the file from its source") from error


def check_sections(file: Path, config: Mapping[str, Any]) -> None:
    """Raises: UserError: `file` does not say the model and prompt format of the weights."""
    if "${" in json.dumps(config):  # would be resolved, an environment variable for instance
        raise UserError(f"'{file}' holds an interpolation (${{...}}), which no checkpoint needs: remove it")
    for section in ("model", "processor"):
        if not isinstance(config.get(section), dict):
            raise UserError(f"'{file}' lacks the section '{section}': restore the file from its source")


def require(folder: Path, name: str) -> None:
    """Raises: UserError: the folder lacks that file."""
    if not (folder / name).is_file():
        raise UserError(f"'{folder / name}' is missing: copy the checkpoint again, whole")


# -- writing ---------------------------------------------------------------------------------------


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON.

    Half a character (a lone surrogate), which UTF-8 cannot hold, is escaped.
    """
    path.write_bytes((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def check_room(path: Path, nbytes: int) -> None:
    """Raises: UserError: the disk that `path` will be on has less space than that."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(there).free) < nbytes:
        raise UserError(f"'{path}' needs {decimal(nbytes)}, and the disk has {decimal(free)} left: free some space")


def linked(path: Path) -> Path:
    """The target of a link, where a folder in its place is to lie; any other path as it is."""
    return path.resolve() if path.is_symlink() else path


def unfinished(path: Path) -> Path:
    """The name of a folder until all of it is there."""
    return path.with_name(f".{path.name}.tmp")


def move_into_place(folder: Path, path: Path, overwrite: bool = True) -> None:
    """Rename a complete folder to `path`, in place of what is there.

    Raises:
        UserError: another process has made `path`, and it may not be overwritten.
    """
    old = replaced(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():  # a folder cannot be renamed over one that is not empty
        if not overwrite:
            raise UserError(
                f"'{path}' was made by somebody else meanwhile: what was to be there is whole in '{folder}'"
            )
        path.rename(old)
    folder.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(*paths: Path) -> None:
    """Wait until the disk has what was written to these files and folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
