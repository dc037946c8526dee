"""All records of a configuration's sources, for scripts that ask questions instead of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sphinx_pl.data.schema import Record
from sphinx_pl.utils.errors import UserError, suggest


def read_records(
    sources: Mapping[str, Any], section: str, names: Sequence[str] | None = None, at_most: int | None = None
) -> tuple[list[Record], dict[str, int]]:
    """The records of the sources in `data.<section>`, and the reasons and counts of what was
    unreadable.

    The name of the source stands in front of each record's key.

    Args:
        at_most: how many records are taken of each source, also of each source in a group; they are
            spread evenly.

    Raises:
        UserError: a name is unknown, or a source cannot be opened.
    """
    from sphinx_pl.data.readers import spread
    from sphinx_pl.data.sampling.config import META, Group, SourceConfig
    from sphinx_pl.data.skip import SkipSample

    for name in names or ():
        if name not in sources:
            raise UserError(f"data.{section} has no source '{name}': {suggest(name, sources)}")
    records: list[Record] = []
    lost: dict[str, int] = {}
    for name in names or sources:
        if sources[name] is None:  # switched off
            continue
        values = sources[name]
        if isinstance(values, dict) and ("sources" in values or values.get("kind") == META):
            leaves = dict(Group.from_dict({"sources": {name: values}}).leaves())
        else:
            leaves = {name: SourceConfig.from_dict(name, values, section)}
        for leaf, config in leaves.items():
            source = config.open(leaf)
            for index in spread(len(source), at_most):
                try:
                    record = source.record(index)
                except SkipSample as error:
                    lost[error.reason] = lost.get(error.reason, 0) + 1
                    continue
                records.append(dataclasses.replace(record, key=f"{leaf}/{record.key}"))
    return records, lost
