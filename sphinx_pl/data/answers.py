"""What a short answer says: the words and letters that tasks and official metrics read from a text."""

from __future__ import annotations

import re
from collections.abc import Container

_WORD = re.compile(r"\W*(\w+)(?![\w-])")
_LETTER = re.compile(r"\s*[\[(（]?([A-Za-z])[^\S\n]*(?:[\]).:,!;）。、：，；]|\n|-\s|$)")


def normalise(text: str) -> str:
    """Lower case, single spaces, no blanks around and no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def leading_word(text: str, words: Container[str]) -> str | None:
    """The word that a text begins with, in lower case, if it is one of `words`: "No.", "yes, it is"; not "no-one"."""
    match = _WORD.match(text)
    return word if match and (word := match[1].lower()) in words else None


def leading_letter(text: str) -> tuple[str, str] | None:
    """The letter that a text begins with, as a capital, and what follows: "B", "b", "(B)", "B. text"; not "Blue"."""
    match = _LETTER.match(text)
    return (match[1].upper(), text[match.end() :]) if match else None
