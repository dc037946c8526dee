"""Published results of other models, each with its source: reference_results.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import yaml

from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError

FILE = Path(__file__).with_name("reference_results.yaml")


@dataclass(frozen=True)
class ReferenceResult:
    """One published number. The file explains the fields."""

    benchmark: str
    model: str
    value: float
    source: str
    split: Optional[str] = None
    metric: Optional[str] = None

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise UserError(f"{self.benchmark} of {self.model} has no source: name the document and its table")

    @property
    def names_split(self) -> bool:
        """Whether the source names one split, rather than a pattern of several."""
        return bool(self.split) and "*" not in str(self.split)


def read_reference_results(file: Path = FILE) -> list[ReferenceResult]:
    """The entries in the file's order.

    Raises:
        UserError: the file cannot be read, or an entry is malformed.
    """
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(entries, list):
        raise UserError(f"{file} must be a list of entries with benchmark, model, value and source")
    return [build(ReferenceResult, entry, f"{file.name}, entry {i + 1}") for i, entry in enumerate(entries)]
