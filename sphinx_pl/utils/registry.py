"""A mapping from names to objects, with a helpful error for unknown names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from sphinx_pl.utils.errors import UserError, suggest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping that `register` fills.

    An unknown name raises `UserError`, which suggests the nearest name.

    Args:
        kind: the singular noun for an entry.
        listed: a file or command that lists the entries if they are too many for an error
            (`suggest`).
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

    def __contains__(self, name: object) -> bool:  # Mapping's version expects a KeyError
        return name in self._entries
