"""Tables for terminals of any width."""

from __future__ import annotations

import copy
import textwrap
from dataclasses import replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column
from rich.table import Table as RichTable

NARROWEST = 16
"""Columns of text are folded to this before others go to a further table."""
UNBOUNDED = 10_000


class Table(RichTable):
    """A table that never cuts a number, which is what columns flush right hold.

    Where the console is too narrow, headings are broken between words and columns of text are folded. Columns that
    still have no room follow in further tables, each of which begins with the first column.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=UNBOUNDED)
        columns = [_unbroken(console, wide, column) for column in self.columns]

        def part(places: list[int]) -> RichTable:
            chosen = copy.copy(self)
            chosen.columns = [replace(columns[place], _index=at) for at, place in enumerate(places)]
            return chosen

        def least(places: list[int]) -> int:
            natural = [_width(console, wide, columns[place]) for place in places]
            beside = RichTable.__rich_measure__(part(places), console, wide).maximum - sum(natural)
            numbers = [columns[place].no_wrap for place in places]
            return beside + sum(n if number else min(n, NARROWEST) for n, number in zip(natural, numbers, strict=True))

        parts = [[0]] if columns else [[]]
        for place in range(1, len(columns)):
            if len(parts[-1]) > 1 and least([*parts[-1], place]) > options.max_width:
                parts.append([0])
            parts[-1].append(place)
        for number, places in enumerate(parts):
            shown = part(places)
            shown.title = self.title if number == 0 else None
            shown.caption = self.caption if number == len(parts) - 1 else None
            yield from RichTable.__rich_console__(shown, console, options)


def _unbroken(console: Console, wide: ConsoleOptions, column: Column) -> Column:
    """The column, kept in one line if it holds numbers; its heading is then broken to be no wider than it must."""
    if column.justify != "right":
        return replace(column, overflow="fold")
    widest = max((Measurement.get(console, wide, cell).maximum for cell in column.cells), default=1)
    header = column.header
    if isinstance(header, str) and header:
        header = textwrap.fill(header, max(widest, *map(len, header.split())), break_on_hyphens=False)
    return replace(column, no_wrap=True, header=header)


def _width(console: Console, wide: ConsoleOptions, column: Column) -> int:
    return max(Measurement.get(console, wide, cell).maximum for cell in (column.header, column.footer, *column.cells))
