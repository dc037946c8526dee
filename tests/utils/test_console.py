"""Tests of tables at every width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from sphinx_pl.callbacks.progress import trainable_table
from sphinx_pl.data.inspect.table import SourceSummary, expectations
from sphinx_pl.utils.console import Steps, Table

LINES = [
    SourceSummary(
        "pretrain_real_alt_text_of_the_web",
        *("image_text", "image", 12, 123456789, False, 0.4213, 1, 1234.5, 99, 1.25, 0, {}),
    ),
    SourceSummary("text", "text", "text", 1, 4000, True, 0.5787, 1, 12.5, 12.5, 0, 0.0123, {}),
]


def printed(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(table: Table) -> list[str]:
    """Return the cells of the columns that hold numbers, column by column."""
    columns = [list(column.cells) for column in table.columns if column.justify == "right"]
    return [str(cell) for column in columns for cell in column]


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
@pytest.mark.parametrize(
    "table",
    [
        expectations(LINES, "sample", 256, 4, 1000),
        trainable_table("pretrain_real", [("decoder", 13015864320, 0), ("projections", 0, 123456789)]),
    ],
    ids=["mixture", "what trains"],
)
def test_no_number_is_cut_at_any_width(table: Table, width: int) -> None:
    output = printed(table, width)
    lines = output.splitlines()
    assert max(map(len, lines)) <= width
    printed_cells = [cell.strip() for line in lines for cell in re.split("[│┃]", line)]
    for cell in cells(table):
        assert cell in printed_cells
    for column in table.columns:
        assert str(column.header) in printed_cells
    assert "…" not in output
    names = "".join(cell for line in lines for cell in re.findall(r"^│ (\S+)", line))
    assert all(str(name) in names for name in table.columns[0].cells)
    single = width >= 160 or (len(table.columns) == 3 and width > 40)
    assert output.count("┏") == 1 if single else output.count("┏") > 1
    title = str(table.title)
    assert " ".join(lines[0].split()) in title


def test_a_long_heading_is_broken_between_words() -> None:
    table = Table("part", title="How far apart they are")
    table.add_column("of what they learned", justify="right")
    table.add_column("distance", justify="right")
    table.add_row("decoder", "0.12", "1.5%")
    assert printed(table, 34).count("decoder") == 1
    assert "learned" in printed(table, 34)


def test_a_log_gets_a_line_when_a_step_begins() -> None:
    console = Console(file=io.StringIO(), width=40)
    steps = Steps(console)
    with steps.of("Mixing curve", 3):
        for weights in ("0, 1", "0.5, 0.5", "1, 0"):
            steps.begin(f"mixing with weights {weights}, then measuring")
            steps.within(0.5, "held-out loss of real")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "Mixing curve  1/3  mixing with weights 0, 1, then measuring"
    assert re.fullmatch(r"Mixing curve  2/3  mixing with weights 0\.5, 0\.5, then measuring  \d:\d\d left", lines[1])
    assert len(lines) == 3


def test_a_terminal_shows_what_a_step_does_and_how_much_is_left() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    steps = Steps(console)
    with steps.of("Mixing curve", 3):
        steps.begin("mixing with weights 0, 1, then measuring")
        steps.within(0.5, "held-out loss of real")
    assert isinstance(console.file, io.StringIO)
    output = console.file.getvalue()
    assert "held-out loss of real" in output
    assert re.search(r"Mixing curve .* 0/3 .*\d:\d\d left", output)
