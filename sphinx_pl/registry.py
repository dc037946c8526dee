"""Name -> object, with an error that helps: used for tasks, metrics, sources and checkpoint formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from sphinx_pl.errors import UserError, suggest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping filled by `register`; an unknown name raises `UserError` with the nearest known one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
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
            raise UserError(f"unknown {self.kind} '{name}': {suggest(name, self._entries)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:  # Mapping's own would call __getitem__ and want a KeyError
        return name in self._entries
