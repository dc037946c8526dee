"""Numbers of other models that somebody published, each with its source: reference_results.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import yaml

from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError

FILE = Path(__file__).with_name("reference_results.yaml")


@dataclass(frozen=True)
class Published:
    """One number. The file says what the fields mean."""

    benchmark: str
    model: str
    value: float
    source: str
    split: Optional[str] = None
    measure: Optional[str] = None

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise UserError(f"{self.benchmark} of {self.model} has no source: a number without one is not entered")

    @property
    def names_split(self) -> bool:
        """Whether the source says which split it is of, rather than that it is one of several."""
        return bool(self.split) and "*" not in str(self.split)


def read_published(file: Path = FILE) -> list[Published]:
    """The entries in the file's order.

    Raises:
        UserError: it cannot be read, or an entry is not what it should be.
    """
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(entries, list):
        raise UserError(f"{file} must be a list of entries with benchmark, model, value and source")
    return [build(Published, entry, f"{file.name}, entry {i + 1}") for i, entry in enumerate(entries)]
