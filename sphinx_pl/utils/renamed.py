"""The new names of configuration keys that were renamed.

Runs from before a renaming are read with the new names. Whoever writes an old key is told the new one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_RENAMED = {
    r"stage\.rows_per_step": "stage.global_batch_rows",
    r"recipe\.(\w+)\.towers": r"recipe.\1.vits",
    r"data\.packing\.rows": "data.packing.micro_batch_rows",
    r"data\.mixing\.lanes": "data.mixing.partitions",
    r"(data\.(?:val_)?sources\..+|data\.test\..+)\.branches": r"\1.questions_per_sample",
    r"model\.vision\.(?!encoders\.)(\w+)\.(\w+)": r"model.vision.encoders.\1.\2",
}
"""The full name of an old key, as a regular expression -> the key's new name."""


def new_key(key: str) -> str | None:
    """The new name of a renamed key, by full names; None if the key was not renamed."""
    for old, new in _RENAMED.items():
        if match := re.fullmatch(old, key):
            return match.expand(new)
    return None


def renamed_key(key: str) -> str | None:
    """The sentence that answers an old key; None if the key was not renamed."""
    new = new_key(key)
    return f"{key} is called {new} now" if new else None


def with_new_keys(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration, or the section of it called `prefix`, with every renamed key under its new name.

    A value stays in its section: a new name that differs in more than its last part is not applied.
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        new = new_key(key)
        if new is not None and new.rpartition(".")[0] == prefix:
            key, name = new, new.rpartition(".")[2]
        result[name] = with_new_keys(value, key) if isinstance(value, Mapping) else value
    return result
