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
