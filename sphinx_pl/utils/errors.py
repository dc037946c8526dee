"""The one exception that a user is meant to read.

Anything a user can get wrong (a key, a file, a size) raises `UserError` with a single sentence that
names the key or the file and the way out. The entry scripts print that sentence and exit with 2;
a traceback appears only with the environment variable SPHINX_TRACEBACK=1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was wrong, where, and what to do, in one line."""


SHORT = 12
"""So many names are read at a glance."""


def suggest(name: str, known: Iterable[str], listed: str = "") -> str:
    """`did you mean 'x'?` for a near miss, then what exists: all names, or, where they are many, who lists them.

    Args:
        listed: what lists the names when there are more than `SHORT`, such as a file; "": they are listed here all the
            same.
    """
    choices = sorted(set(known))
    near = difflib.get_close_matches(name, choices, n=1)
    there = f"known: {', '.join(choices)}" if not listed or len(choices) <= SHORT else f"{listed} lists them"
    return f"did you mean '{near[0]}'? {there}" if near else there


SYNONYMS = {
    "batch_size": "data.packing.micro_batch_rows",
    "epochs": "data.mixing.epochs",
    "gradient_accumulation_steps": "stage.accumulate",
    "max_epochs": "data.mixing.epochs",
    "num_train_epochs": "data.mixing.epochs",
    "num_workers": "data.workers",
    "resume": "ckpt_path",
    "shuffle": "data.sources.NAME.shuffle_shards",
    "warmup_steps": "stage.optim.warmup",
}
"""What other programs call a key -> the key here."""


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The full key that was most likely meant by `key`, or None.

    The last parts of keys count as much as the whole keys, so `lr` finds `stage.optim.lr`. An abbreviation by initials
    counts as equal: `learning_rate` and `lr`.
    """
    leaf = key.rpartition(".")[2]
    choices = [choice for choice in known if choice != key]
    if (meant := SYNONYMS.get(leaf)) and ("NAME" in meant or meant in choices):
        return meant

    def likeness(choice: str) -> float:
        other = choice.rpartition(".")[2]
        same = other in (leaf, _initials(leaf)) or leaf == _initials(other)
        return (1.0 if same else _ratio(leaf, other)) + _ratio(key, choice)

    best = max(choices, key=likeness, default="")
    return best if best and likeness(best) >= 1.2 else None


def _initials(name: str) -> str:
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else name


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
