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


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a near miss, else the list of what exists."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(choices)}"
