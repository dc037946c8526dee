"""What a checkpoint's provenance says of the mixing that made it, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def distances_table(said: Mapping[str, Any]) -> Table:
    """How far apart the mixed models are, by part: distances as a share of the first model's length, and cosines."""
    parts: Mapping[str, Any] = said["parts"]
    if not parts:
        return Table("no tensor holds numbers that can be mixed")
    pairs = [tuple(map(int, pair[:2])) for pair in next(iter(parts.values()))["distances"]]
    names = {place: str(place) for pair in pairs for place in pair}
    if said.get("base"):
        names[max(names)] = "base"
    table = Table("part", title="How far apart they are", title_justify="left")
    table.add_column("parameters", justify="right")
    for i, j in pairs:
        table.add_column(f"{names[i]}–{names[j]}: distance", justify="right")
        table.add_column("cosine", justify="right")
    for i, j, _ in next(iter(parts.values())).get("task_cosines", ()):
        table.add_column(f"{names[i]}–{names[j]}: cosine of what they learned", justify="right")
    for part, values in parts.items():
        cells = []
        for (i, _, distance), (*_, cosine) in zip(values["distances"], values["cosines"], strict=True):
            length = values["norms"][int(i)]
            cells += (
                ["equal", ""] if values["equal"] else [f"{distance / length if length else 0:.2%}", f"{cosine:.6f}"]
            )
        cells += [f"{cosine:.4f}" for *_, cosine in values.get("task_cosines", ())]
        table.add_row(Text(part), f"{values['parameters']:,}", *cells)
    return table
