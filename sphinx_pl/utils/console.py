"""Tables and progress bars for terminals of any width and for logs."""

from __future__ import annotations

import copy
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import Progress as Bar
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

NARROWEST = 16
"""Text columns are folded down to this width before further columns move to another table."""
UNBOUNDED = 10_000
SHORTEST_BAR = 8


class Table(RichTable):
    """A table that never cuts a number. Right-aligned columns hold numbers.

    On a narrow console, headings are broken between words and text columns are folded. Columns that
    still do not fit follow in further tables, each of which begins with the first column.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=UNBOUNDED)
        columns = [_unbroken(console, wide, column) for column in self.columns]

        def part(places: list[int]) -> RichTable:
            table = copy.copy(self)
            table.columns = [replace(columns[place], _index=at) for at, place in enumerate(places)]
            return table

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
            table = part(places)
            table.title = self.title if number == 0 else None
            table.caption = self.caption if number == len(parts) - 1 else None
            yield from RichTable.__rich_console__(table, console, options)


def _unbroken(console: Console, wide: ConsoleOptions, column: Column) -> Column:
    """Return the column without line breaks if it holds numbers.

    Its heading is then broken into lines no wider than necessary.
    """
    if column.justify != "right":
        return replace(column, overflow="fold")
    widest = max((Measurement.get(console, wide, cell).maximum for cell in column.cells), default=1)
    header = column.header
    if isinstance(header, str) and header:
        header = textwrap.fill(header, max(widest, *map(len, header.split())), break_on_hyphens=False)
    return replace(column, no_wrap=True, header=header)


def _width(console: Console, wide: ConsoleOptions, column: Column) -> int:
    return max(Measurement.get(console, wide, cell).maximum for cell in (column.header, column.footer, *column.cells))


class StepBar(Bar):
    """A name, a bar, the step and the remaining time on one line of any width, with notes below.

    If the line is narrow, the elapsed time is dropped first, then the end of the name. The fields
    of a task are `notes`, which are never cut, and `left` in seconds, None if it is unknown.
    """

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            width, name = self.console.width, task.description
            rest = f" {task.completed:.0f}" + ("" if task.total is None else f"/{task.total:.0f}")
            elapsed = f"  {clock(task.elapsed or 0)} elapsed"
            left = "" if task.fields["left"] is None else f"  {clock(task.fields['left'])} left"
            if cell_len(name + rest + elapsed + left) + 1 + SHORTEST_BAR <= width:
                rest += elapsed
            rest += left
            room = width - cell_len(rest) - 1 - SHORTEST_BAR
            if cell_len(name) > room:
                name = f"{name[: room - 1]}…" if room > 1 else ""
            bar = ProgressBar(total=task.total, completed=task.completed, width=width - cell_len(name + rest) - 1)
            line = RichTable.grid()
            line.add_row(Text(f"{name} ", style="bold"), bar, Text(rest))
            yield line
            yield from map(Text, _lines(task.fields["notes"], width))


def _lines(parts: Sequence[str], width: int) -> list[str]:
    """Return lines that hold as many parts as fit."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(f"{lines[-1]}  {part}") <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


class Steps:
    """Shows the current step of a job, from its first second, and the remaining time.

    On a terminal it draws a `StepBar`. In a log it writes one line when a step begins.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._name, self._total, self._done, self._start = "", 0, -1, 0.0
        self._bar: StepBar | None = None

    @contextmanager
    def of(self, name: str, total: int) -> Iterator[None]:
        """The code in this context takes at most `total` steps."""
        self._name, self._total, self._done, self._start = name, total, -1, time.monotonic()
        if self.console.is_terminal:
            self._bar = StepBar(console=self.console, refresh_per_second=4)
            self._task = self._bar.add_task(name, total=total, notes=[], left=None)
            self._bar.start()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def begin(self, doing: str) -> None:
        """Begin the next step."""
        self._done += 1
        self.within(0.0, doing)
        if self._bar is None and self._name:
            left = self._left(0.0)
            when = () if left is None else (f"{clock(left)} left",)
            line = "  ".join((self._name, f"{self._done + 1}/{self._total}", doing, *when))
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def within(self, share: float, doing: str) -> None:
        """Update the share of the current step that is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done + share, notes=[doing], left=self._left(share))

    def _left(self, share: float) -> float | None:
        """Return the remaining seconds, estimated from the mean speed so far."""
        done = self._done + share
        return (time.monotonic() - self._start) / done * (self._total - done) if done > 0 else None


def clock(seconds: float) -> str:
    """Return seconds as 1:02:03, or as 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
