"""Name -> object, with an error that helps: used for tasks, metrics, sources and checkpoint formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from sphinx_pl.utils.errors import UserError, suggest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping filled by `register`; an unknown name raises `UserError` with the nearest known one and what there is.

    Args:
        kind: what the entries are, in the singular.
        listed: what lists them all, where they are too many for an error (`suggest`).
    """

    def __init__(self, kind: str, listed: str = "") -> None:
        self.kind, self.listed = kind, listed
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise UserError(f"unknown {self.kind} '{name}': {suggest(name, self._entries, self.listed)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:  # Mapping's own would call __getitem__ and want a KeyError
        return name in self._entries
