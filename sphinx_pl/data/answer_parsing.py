"""The parsers of short answers: one for each kind, used by tasks and benchmarks alike.

| kind of answer | parser                                          | official leniency                              |
|----------------|-------------------------------------------------|------------------------------------------------|
| yes or no      | `read_yes_or_no`                                | `official="pope"`, `"mme"`; VSR's other words  |
| a choice       | `read_letter`                                   | `stated=True`: the official reading by text    |
| a number       | `read_number`                                   | `official="chartqa"`                           |
| a box          | `sphinx_pl.data.coordinates.Coordinates.parse_boxes` | none                                      |

A text that says two different things says neither: "yes or no", "A or B", a repetition of all
options.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence

YES_NO: Mapping[str, bool] = {"yes": True, "no": False}
TRUE_FALSE: Mapping[str, bool] = {"true": True, "false": False, **YES_NO}

_WORD = re.compile(r"\W*(\w+)(?![\w-])")
_WORD_ALONE = re.compile(r"\W*(\w+)(?:\W*$|,)")
_SENTENCE_END = re.compile(r"[.!?]")
# Another word beside the first: joined to it ("yes or no"), or by itself ("yes, no"); not that of
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
# The letter must end there: "The answer is A dog" and "The answer is A or B" name no letter.
_STATED_LETTER = re.compile(
    r"(?i:\banswer(?:\s+is|\s*:|\s+is\s*:)|\b(?:choice|option)\s+is|^\s*(?:option|choice)\b)\s*(?i:(?:option|choice|letter)\s+)?"
    r"(?:\(([A-Za-z])\)|([A-Za-z]))(?=\s*(?:$|[).:;!\n。]|is\s+(?:the\s+)?(?:correct|right)\b|,(?!\s*\(?[A-Za-z]\b)|because\b|since\b))"
)
_LEAD = re.compile(
    r"\s*(?:so\s+|therefore,?\s+)?(?:the\s+)?(?:correct\s+|right\s+|best\s+)?answer(?:\s+is\s*:?|\s*:)\s*", re.I
)
_CALLED_RIGHT = re.compile(r"\(?([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b")
_WITH_TEXT = re.compile(r"\(?([A-Za-z])\)?\s+(.+)", re.DOTALL)
_EMPHASIS = str.maketrans("", "", "*`")
_STATED = re.compile(r"\banswer(?:\s+is|\s*:|\s+is\s*:)\s*(.*)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,/])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?![\d/]|[.,]\d)")


def normalise(text: str) -> str:
    """The text in lower case with single spaces, without blanks around it and final full stops."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def plain(text: str) -> str:
    """The text with composed accents, and with plain letters and marks instead of wide ones (Ａ．)."""
    return unicodedata.normalize("NFC", text).translate(_WIDE)


def read_yes_or_no(text: str, official: str = "", words: Mapping[str, bool] = YES_NO) -> bool | None:
    """True for yes, False for no, None for a text that says neither or both.

    The text must begin with the word, in any case: "No.", "yes, it is"; not "no-one". Its first
    sentence must not have a word of the other meaning beside it: "yes or no", "Yes/No", "no, yes".
    No later sentence may be such a word or begin with it and a comma: "Yes. No.", "Yes. No, it is
    not." The official scripts read only the beginning, so for them "Yes. No." is yes. lmms-eval's
    exact match accepts neither, as we do: the rest of the text takes the word back.

    Args:
        official: "pope" or "mme" reads as that benchmark's script does, and ignores `words`. POPE's
            `evaluate.py` (Li et al. 2023) reads yes unless "No", "no" or "not" stands between
            blanks in the first sentence, without its commas: so "", "NO" and "I cannot tell" are
            yes. MME's `calculation.py` (Fu et al. 2023) looks for "yes" or "no" in the first four
            letters: so "none" is no.
        words: what each word means. VSR's answers may also be true and false (`TRUE_FALSE`).
    """
    if official == "pope":
        return not {"No", "no", "not"}.intersection(text.split(".")[0].replace(",", "").split(" "))
    if official == "mme":
        start = text.lower().strip()[:4]
        return True if "yes" in start else False if "no" in start else None
    first = _WORD.match(text)
    if not first or (word := first[1].lower()) not in words:
        return None
    rest, *later = _SENTENCE_END.split(text[first.end() :])
    others = [match[1] or match[2] for match in _ALSO.finditer(rest)]
    others += [match[1] for sentence in later if (match := _WORD_ALONE.match(sentence))]
    meanings = {words.get(other.lower(), words[word]) for other in others}
    return words[word] if meanings <= {words[word]} else None


def read_number(text: str, official: str = "") -> float | None:
    """The number that a text gives, or None.

    It is all of the text, what the text states ("The answer is 14 cm."), or the only number in it.
    Thousands separators and a unit behind it are accepted.

    Args:
        official: "chartqa" reads as relaxed accuracy does (`relaxed_correctness` of pix2struct).
            The whole text must be a number to Python's `float`, and one that ends in "%" is divided
            by 100: "45%" is 0.45, "1,000" is none.
    """
    if official == "chartqa":
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None
    for part in (*(match[1] for match in _STATED.finditer(text)), text):
        numbers = {float(match[0].replace(",", "")) for match in _NUMBER.finditer(part)}
        if len(numbers) == 1:
            return numbers.pop()
    return None


def read_letter(text: str, options: Sequence[str] = (), stated: bool = False) -> str | None:
    """The capital letter of the option that a text names; None where it names none or several.

    A text names an option by the letter at its beginning: "B", "b.", "(B)", "B: ..."; "Blue" is no
    letter. A text that names several names none: "A, B", "C. bird or D. fish", a repetition of the
    options, "B. cat" where "cat" is A's text. A letter that is taken back names none either: "A.
    not a cat", "A. cat, dog".

    Args:
        options: texts of the options A, B, ..., where they are known; at most 26.
        stated: also read a letter that the text states ("Answer: B", "The answer is (B).", "B is
            correct"), and an option's text, alone or after a letter or such words, but for case,
            white space and the full stop at its end. A text that two options have names none. "C.
            Darwin" is the option of that text, unless "Darwin" is C's. The official scripts of
            multiple choice read so; `options` must be known.
    """
    return _stated_letter(text, options) if stated else _only_letter(text, options)


def _only_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter that a text begins with, unless it names another one too."""
    leading = leading_letter(text)
    if leading is None:
        return None
    letter, rest = leading
    own = dict(zip(string.ascii_uppercase, options, strict=False)).get(letter)
    if own is not None and normalise(plain(rest)) == normalise(plain(own)):
        return letter
    if is_taken_back(letter, rest, options):
        return None
    return letter if listed_letters(text, options) | first_letters(text) == {letter} else None


def _stated_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option that a text names, by letter, by text or as the answer."""
    text = plain(text).translate(_EMPHASIS).strip(" \t\r\n\"'")
    letters = string.ascii_uppercase[: len(options)]
    by_text: dict[str, set[str]] = {}
    for letter, option in zip(letters, options, strict=True):
        if name := normalise(plain(option)):  # else an empty answer would name it
            by_text.setdefault(name, set()).add(letter)
    lead = _LEAD.match(text)
    body = text[lead.end() :] if lead else text
    leading = leading_letter(body)
    if leading and leading[0] in letters and not leading[1].strip(" )].:,;!-\n。、：，；"):
        return leading[0]
    own = leading[0] if leading and leading[0] in by_text.get(normalise(leading[1]), ()) else None  # "B. cat"
    whole = by_text.get(normalise(text), set()) | by_text.get(normalise(body), set())
    if len(whole) == 1 and not own:
        return whole.pop()
    if own and not whole:
        return own
    if (beside := _WITH_TEXT.fullmatch(body)) and beside[1].upper() in by_text.get(normalise(beside[2]), ()):
        return beside[1].upper()  # "B cat"
    named = whole | first_letters(body) | {(match[1] or match[2]).upper() for match in _STATED_LETTER.finditer(text)}
    if leading:
        named |= by_text.get(normalise(leading[1]), set())
        if is_taken_back(leading[0], leading[1], options):
            return None
    called = {match[1] for match in _CALLED_RIGHT.finditer(text)}
    if _CALLED_RIGHT.match(text):
        named |= called
    others = (listed_letters(body, options) | called) & set(letters)
    return named.pop() if len(named) == 1 and others <= named <= set(letters) else None


def leading_letter(text: str) -> tuple[str, str] | None:
    """The letter that a text begins with, as a capital, and what follows: "B", "b", "(B)", "B.
    text"; not "Blue"."""
    match = _LETTER.match(text)
    return (match[1].upper(), text[match.end() :]) if match else None


def is_taken_back(letter: str, rest: str, options: Sequence[str]) -> bool:
    """Whether what follows a letter denies it ("A. not a cat", "A: wrong") or lists another
    option's text ("A. cat, dog"). The letter's own text at the beginning is no denial."""
    texts = dict(zip(string.ascii_uppercase, (normalise(plain(option)) for option in options), strict=False))
    own = texts.pop(letter, "")
    content = _ARTICLE.sub("", plain(rest).lower().strip(), count=1)
    if own and content.startswith(own):
        content = content[len(own) :]
    elif options and _DENIED.match(plain(rest)):
        return True
    parts = {_ARTICLE.sub("", normalise(part), count=1) for part in _BETWEEN.split(content)} - {"", own}
    return bool(parts & set(texts.values()))


def first_letters(text: str) -> set[str]:
    """The letters at the beginning of a text, one after the other: A and B of "A, B"."""
    letters = set()
    while leading := leading_letter(text):
        letter, text = leading
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
