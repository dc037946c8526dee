"""The mixing that made a checkpoint, from its provenance, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from sphinx_pl.utils.console import Table


def distances_table(mixing: Mapping[str, Any]) -> Table:
    """The models' distances as a share of the first one's length, and cosines, by part."""
    parts: Mapping[str, Any] = mixing["parts"]
    if not parts:
        return Table("no tensor holds numbers that can be mixed")
    base = max(int(j) for _, j, _ in next(iter(parts.values()))["distances"]) if mixing.get("base") else None
    table = Table("part", title="How far apart they are", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("between")
    table.add_column("distance", justify="right")
    table.add_column("cosine", justify="right")
    if base is not None:
        table.add_column("of what they learned", justify="right")
    for part, values in parts.items():
        head: list[str | Text] = [Text(part), f"{values['parameters']:,}"]
        if values["equal"]:
            table.add_row(*head, "all", "equal")
            continue
        learned = {(i, j): cosine for i, j, cosine in values.get("task_cosines", ())}
        for (i, j, distance), (*_, cosine) in zip(values["distances"], values["cosines"], strict=True):
            length = values["norms"][int(i)]
            share = "–" if None in (distance, length) else f"{distance / length if length else 0:.2%}"
            more = [f"{learned[i, j]:.4f}"] if (i, j) in learned else []
            angle = "–" if cosine is None else f"{cosine:.6f}"
            table.add_row(*head, f"{i}, {'base' if j == base else j}", share, angle, *more)
            head = ["", ""]
    return table
