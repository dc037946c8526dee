"""The names of objects: from a description, a title or a file's name to plain words.

Two names are of one object if their nouns are equal: "A red apple." and "Apples" are both "apple".
The noun is the last word before a preposition or a verb, in the singular.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_ARTICLE = re.compile(r"^\s*(?:an?|the|another|some)\s+", re.IGNORECASE)
_QUOTES = re.compile("[\"“”‘’']")
_PHRASE_END = re.compile(r"[.!?,;:()\[\]—–]|\s-+\s")
_WORD = re.compile("[a-z]+")
# A name ends before these words.
_STOPS = frozenset(
    (
        *("of", "with", "without", "in", "on", "from", "for", "at", "by", "and", "or", "like", "under", "over", "near"),
        *("to", "into", "as", "is", "are", "was", "were", "has", "means", "resembles", "stands", "this", "that"),
        *("which", "who", "whose", "holding", "playing", "covered", "called"),
    )
)
# "A pair of cherries" names cherries.
_UNITS = frozenset(["bunch", "group", "head", "kind", "pair", "piece", "set", "slice", "type"])
# The last words of titles that say how something looks or is drawn, not what it is.
_MANNERS = frozenset(
    (
        *("art", "drawing", "drawn", "hand", "icon", "illustration", "logo", "outline", "simple", "style", "symbol"),
        *("black", "blue", "brown", "gray", "green", "grey", "pink", "purple", "red", "white", "yellow"),
        *("clothing", "closed", "left", "open", "right"),
    )
)
MOST_WORDS = 4
SHORTEST_NOUN = 3


@dataclass(frozen=True)
class ObjectName:
    """The name of an object.

    Attributes:
        text: its words in lower case, without an article.
        noun: the last of them in the singular, by which objects are told apart.
    """

    text: str
    noun: str

    @property
    def phrase(self) -> str:
        """The name with an article, or without one in the plural."""
        plural = self.noun != self.text.split()[-1]
        return self.text if plural else f"{'an' if self.text[0] in 'aeiou' else 'a'} {self.text}"

    @property
    def folded(self) -> str:
        """The name with its noun in the singular: equal for two spellings of one name."""
        return " ".join([*self.text.split()[:-1], self.noun])


def plain(text: str) -> str:
    """Return the text in lower-case ASCII; accents are dropped."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def name_in_sentence(text: str) -> ObjectName | None:
    """Return what a description names, None unless it begins with an article and a short phrase."""
    article = _ARTICLE.match(text)
    if article is None:
        return None
    phrase = _PHRASE_END.split(_QUOTES.sub("", text[article.end() :]), maxsplit=1)[0]
    return _named(_WORD.findall(plain(phrase)), None)


def name_in_title(text: str, words: frozenset[str]) -> ObjectName | None:
    """Return what a title or a file's name names, None if it has other words than English ones.

    Digits are dropped, as in "candle_02". A name in capitals within a word ends it, as in
    "redApple".
    """
    spaced = re.sub("(?<=[a-z])(?=[A-Z])", " ", _QUOTES.sub("", _ARTICLE.sub("", text)))
    return _named(_WORD.findall(plain(re.sub(r"[\d_-]+", " ", spaced))), words)


def _named(found: list[str], words: frozenset[str] | None) -> ObjectName | None:
    """Return the name in a row of words; with `words`, only if it consists of these."""
    stop = next((place for place, word in enumerate(found) if word in _STOPS), len(found))
    name = found[:stop]
    if name and name[-1] in _UNITS and found[stop : stop + 1] == ["of"]:
        return _named(found[stop + 1 :], words)
    while name and name[-1] in _MANNERS:
        name = name[:-1]
    if not 1 <= len(name) <= MOST_WORDS or any(len(word) == 1 for word in name) or len(name[-1]) < SHORTEST_NOUN:
        return None
    if words is not None and not all(word in words for word in name):
        return None
    return ObjectName(" ".join(name), singular(name[-1]))


def singular(word: str) -> str:
    """Return a noun with a regular plural folded: cherries, boxes and cats are cherry, box and cat."""
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "zes", "oes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
