"""The words and letters that tasks and official metrics read from a short answer.

A text that gives two different answers gives none: "yes or no", "A or B", a repetition of all
options.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TypeVar

_T = TypeVar("_T")

_WORD = re.compile(r"\W*(\w+)(?![\w-])")
_SENTENCE_END = re.compile(r"[.!?]")
# Another word beside the first: joined to it ("yes or no") or by itself ("yes, no"), but not in
# "yes, no dog".
_ALSO = re.compile(
    r"^\W*(?:[/|]|\b(?:or|and)\b)\W*(\w+)(?![\w-])"
    r"|(?:^|[,;:/|\n]|\b(?:or|and)\b)\W*(\w+)(?![\w-])(?=\s*(?:$|[,;:/|)\n]))",
    re.IGNORECASE,
)
_LETTER = re.compile(r"\s*[\[(（]?([A-Za-z])[^\S\n]*(?:[\]).:,!;）。、：，；]|\n|-\s|$)")
# A letter that is one of several: it begins a line or follows a comma or "or". A mark, the end or
# another one follows.
_LISTED = re.compile(
    r"(?:^[-•]?|[,;/|&，；、]|\b(?:or|and)\b|[或和及])\s*(?:(?:option|choice)\s+)?"
    r"(?:[\[(]([A-Za-z])[\])]|([A-Za-z])(?:[).:](?=\s|$)|\s+-\s|(?=\s*(?:$|[,;/|&，；、。]|\b(?:or|and)\b|[或和及]))))",
    re.IGNORECASE | re.MULTILINE,
)
_MARKED = re.compile(r"(?<![\w'])[\[(]?([A-Za-z])[\]).:]+\s*(?=\S)")
_DENIED = re.compile(
    r"\W*(?:(?:(?:is|are|was|were)\s+)?(?:not|never)\b|(?:is|are|was|were)n['’]?t\b"
    r"|(?:(?:is|are)\s+)?(?:no|wrong|incorrect|false)\s*(?:$|[.,;:!\n]))",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"[,;/|&\n]|\b(?:or|and)\b")
_ARTICLE = re.compile(r"(?:an?|the)\s+", re.IGNORECASE)
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # Ａ is A


def normalise(text: str) -> str:
    """The text in lower case with single spaces, without blanks around it and full stops at its
    end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def plain(text: str) -> str:
    """The text with composed accents, and with plain letters and marks instead of wide ones (Ａ．)."""
    return unicodedata.normalize("NFC", text).translate(_WIDE)


def leading_value(text: str, values: Mapping[str, _T]) -> _T | None:
    """The value of the word that a text begins with, in any case: "No.", "yes, it is", but not
    "no-one".

    It is None if the first sentence has a word of another value beside it: "yes or no", "Yes/No",
    "no, yes".
    """
    first = _WORD.match(text)
    if not first or (word := first[1].lower()) not in values:
        return None
    rest = _SENTENCE_END.split(text[first.end() :], maxsplit=1)[0]
    said = {values.get((match[1] or match[2]).lower(), values[word]) for match in _ALSO.finditer(rest)}
    return values[word] if said <= {values[word]} else None


def leading_letter(text: str) -> tuple[str, str] | None:
    """The letter that a text begins with, as a capital, and the rest: of "B", "b", "(B)", "B.
    text", not of "Blue"."""
    match = _LETTER.match(text)
    return (match[1].upper(), text[match.end() :]) if match else None


def read_letter(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter that a text begins with; None if it names another letter too.

    Args:
        options: the texts of the options A, B, ..., if they are known.
    """
    found = leading_letter(text)
    if found is None:
        return None
    letter, rest = found
    own = dict(zip(string.ascii_uppercase, options, strict=False)).get(letter)
    if own is not None and normalise(plain(rest)) == normalise(plain(own)):
        return letter
    if is_taken_back(letter, rest, options):
        return None
    return letter if listed_letters(text, options) | first_letters(text) == {letter} else None


def is_taken_back(letter: str, rest: str, options: Sequence[str]) -> bool:
    """Whether the text behind a letter denies it ("A. not a cat", "A: wrong") or lists another
    option ("A. cat, dog").

    The letter's own text at the beginning is no denial.
    """
    texts = dict(zip(string.ascii_uppercase, (normalise(plain(option)) for option in options), strict=False))
    own = texts.pop(letter, "")
    said = _ARTICLE.sub("", plain(rest).lower().strip(), count=1)
    if own and said.startswith(own):
        said = said[len(own) :]
    elif options and _DENIED.match(plain(rest)):
        return True
    parts = {_ARTICLE.sub("", normalise(part), count=1) for part in _BETWEEN.split(said)} - {"", own}
    return bool(parts & set(texts.values()))


def first_letters(text: str) -> set[str]:
    """The letters at the beginning of a text, one after the other: A and B of "A, B"."""
    letters = set()
    while found := leading_letter(text):
        letter, text = found
        letters.add(letter)
    return letters


def listed_letters(text: str, options: Sequence[str] = ()) -> set[str]:
    """The letters that a text lists, such as C and D of "C. bird or D. fish".

    A listed letter begins a line, follows a comma, "or" or "and", or has its option's text behind
    it.
    """
    text = plain(text)
    letters = {(match[1] or match[2]).upper() for match in _LISTED.finditer(text)}
    texts = dict(zip(string.ascii_uppercase, (normalise(plain(option)) for option in options), strict=False))
    for match in _MARKED.finditer(text):
        own = texts.get(match[1].upper())
        rest = normalise(text[match.end() :])
        if own and (rest.startswith(own) or _ARTICLE.sub("", rest, count=1).startswith(own)):
            letters.add(match[1].upper())
    return letters
