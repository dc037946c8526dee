"""`python -m sphinx_pl.cli.convert NAME --src FOLDER --out FILE.jsonl` turns official annotation
files into instructions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sphinx_pl.data.converters import CONVERTERS, Report, convert
from sphinx_pl.runtime.hydra_app import report as report_error
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Return exit code 0, or 2 after a line that names the mistake."""
    parser = argparse.ArgumentParser(prog="python -m sphinx_pl.cli.convert", description=__doc__)
    parser.add_argument("name", nargs="?", help="the data set; without it, all are listed")
    parser.add_argument("--src", type=Path, help="folder with the official files, under their official names")
    parser.add_argument("--out", type=Path, help="file to write, .jsonl; a report is written beside it")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--limit", type=int, help="stop after this number of entries, for a first look")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.name is None:
            console.print(_listing())
            return 0
        kind = CONVERTERS[options.name]
        if options.src is None or options.out is None:
            raise UserError(f"{options.name} needs --src (the folder with the files of {kind.url}) and --out")
        if not options.src.is_dir():
            raise UserError(f"--src={options.src} is not a folder")
        columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed} entries"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(kind.title, total=None)
            report = convert(
                kind(options.src, options.split),
                options.out,
                options.limit,
                lambda done: bar.update(task, completed=done),
            )
    except UserError as error:
        return report_error(error)
    console.print(_table(kind.title, report))
    console.print(f"{report.records.total()} records in {options.out}")
    return 0


def _listing() -> Table:
    table = Table(title="converters")
    for column in ("name", "data set", "splits", "tasks", "files from"):
        table.add_column(column, overflow="fold")
    for name, kind in sorted(CONVERTERS.items()):
        table.add_row(name, kind.title, ", ".join(kind.splits), ", ".join(kind.tasks), kind.url)
    return table


def _table(title: str, report: Report) -> Table:
    table = Table(title=f"{title}: {report.entries} entries")
    for column in ("", "what", "count", "for example"):
        table.add_column(column, overflow="fold")
    for task, count in report.records.most_common():
        table.add_row("record", task, str(count), "")
    for reason, count in report.dropped.most_common():
        table.add_row("dropped", reason, str(count), report.examples[reason][0])
    for reason, count in report.skipped.most_common():
        table.add_row("not meant", reason, str(count), "")
    for reason, count in report.left_out.most_common():
        table.add_row("left out", reason, str(count), "")
    return table


if __name__ == "__main__":
    sys.exit(main())
