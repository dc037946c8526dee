"""The one exception that a user is meant to read.

A mistake of the user (in a key, a file, a size) raises `UserError` with a single sentence. It names
the key or the file and the way out. The entry scripts print that sentence and exit with 2. A
traceback appears only with the environment variable SPHINX_TRACEBACK=1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One line that tells what is wrong, where, and what to do."""


SHORT = 12
"""The number of names that a reader takes in at a glance."""


def suggest(name: str, names: Iterable[str], listed: str = "") -> str:
    """Return `did you mean 'x'?` for a similar name, followed by the known names.

    Args:
        listed: a file or command that lists the names. If it is given, a message names it instead
            of listing more than `SHORT` names.
    """
    choices = sorted(set(names))
    near = difflib.get_close_matches(name, choices, n=1)
    known_names = f"known: {', '.join(choices)}" if not listed or len(choices) <= SHORT else f"{listed} lists them"
    return f"did you mean '{near[0]}'? {known_names}" if near else known_names


SYNONYMS = {
    "batch_size": "data.packing.micro_batch_rows",
    "criterion": "objective",
    "epochs": "data.mixing.epochs",
    "gradient_accumulation_steps": "stage.accumulate",
    "lean": "reweighting",
    "max_epochs": "data.mixing.epochs",
    "num_train_epochs": "data.mixing.epochs",
    "num_workers": "data.workers",
    "resume": "ckpt_path",
    "shuffle": "data.sources.NAME.shuffle_shards",
    "warmup_steps": "stage.optim.warmup",
}
"""Keys of other programs or of earlier versions, and the keys with the same meaning here."""


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """Return the full key that the user most likely meant by `key`, or None.

    The last parts of keys count as much as the whole keys, so `lr` finds `stage.optim.lr`. An
    abbreviation by initials counts as equal: `learning_rate` and `lr`.
    """
    leaf = key.rpartition(".")[2]
    choices = [choice for choice in keys if choice != key]
    if (synonym := SYNONYMS.get(leaf)) and ("NAME" in synonym or synonym in choices):
        return synonym

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
