"""`python -m sphinx_pl.checkpoint show PATH`: what a checkpoint holds and where it comes from."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table

from sphinx_pl.checkpoint.format import Checkpoint, TensorInfo, open_checkpoint
from sphinx_pl.errors import UserError


def parts_table(checkpoint: Checkpoint) -> Table:
    """Tensors, parameters, dtypes and bytes of each part: a tower, or a module such as `decoder.layers`."""
    infos: dict[str, list[TensorInfo]] = defaultdict(list)
    for name in checkpoint:
        words = name.split(".")
        infos[".".join(words[: 3 if words[1:2] == ["towers"] else 2])].append(checkpoint.info(name))
    table = Table(title=f"{checkpoint.path}", show_footer=True)
    everything = [info for group in infos.values() for info in group]
    columns = {
        "part": ([*infos], "total"),
        "tensors": ([len(group) for group in infos.values()], len(everything)),
        "parameters": ([sum(i.numel for i in group) for group in infos.values()], sum(i.numel for i in everything)),
        "MiB": ([_mebibytes(group) for group in infos.values()], _mebibytes(everything)),
        "dtype": ([_dtypes(group) for group in infos.values()], ""),
    }
    for title, (_, footer) in columns.items():
        table.add_column(title, _text(footer), justify="left" if title in ("part", "dtype") else "right")
    for row in zip(*(cells for cells, _ in columns.values()), strict=True):
        table.add_row(*map(_text, row))
    return table


def provenance_table(checkpoint: Checkpoint) -> Table:
    """The provenance without the composed configuration, which is long and lies in `provenance.json`."""
    table = Table("provenance", "", show_header=True)
    for key, value in checkpoint.provenance.items():
        if key == "parents":
            for parent in value:
                table.add_row("parent", f"{parent['path']} ({parent['stage']}) sha256 {parent['sha256'][:16]}…")
        elif key == "command":
            table.add_row(key, " ".join(value))
        elif key != "config":
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            table.add_row(key, ", ".join(f"{name} {item}".strip() for name, item in pairs))
    return table


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else str(value)


def _mebibytes(group: list[TensorInfo]) -> float:
    return float(sum(info.numel * info.dtype.itemsize for info in group) / 2**20)


def _dtypes(group: list[TensorInfo]) -> str:
    return ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in group}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sphinx_pl.checkpoint", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="parts, dtypes, parameter counts and provenance")
    show.add_argument("path", help="a checkpoint folder")
    options = parser.parse_args(arguments)
    try:
        checkpoint = open_checkpoint(options.path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console()
    console.print(parts_table(checkpoint), provenance_table(checkpoint))
    return 0


if __name__ == "__main__":
    sys.exit(main())
