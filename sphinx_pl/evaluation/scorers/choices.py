"""Multiple choice: which option an answer names, and the accuracies of the benchmarks that ask so."""

from __future__ import annotations

import re
import string
from collections.abc import Hashable, Iterable, Mapping, Sequence

from sphinx_pl.data.answer_parsing import first_letters, is_taken_back, leading_letter, listed_letters, normalise, plain
from sphinx_pl.evaluation.scorers.groups import mean_by

# The letter must end there: "The answer is A dog" and "The answer is A or B" name no letter.
_STATED = re.compile(
    r"(?i:\banswer(?:\s+is|\s*:|\s+is\s*:)|\b(?:choice|option)\s+is|^\s*(?:option|choice)\b)\s*(?i:(?:option|choice|letter)\s+)?"
    r"(?:\(([A-Za-z])\)|([A-Za-z]))(?=\s*(?:$|[).:;!\n。]|is\s+(?:the\s+)?(?:correct|right)\b|,(?!\s*\(?[A-Za-z]\b)|because\b|since\b))"
)
_LEAD = re.compile(
    r"\s*(?:so\s+|therefore,?\s+)?(?:the\s+)?(?:correct\s+|right\s+|best\s+)?answer(?:\s+is\s*:?|\s*:)\s*", re.I
)
_CALLED_RIGHT = re.compile(r"\(?([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b")
_WITH_TEXT = re.compile(r"\(?([A-Za-z])\)?\s+(.+)", re.DOTALL)
_EMPHASIS = str.maketrans("", "", "*`")


def read_choice(text: str, options: Sequence[str]) -> str | None:
    """The capital letter of the option that a text names, or None: nothing is guessed.

    A text names an option by a letter at its beginning ("B", "b.", "(B)", "B: ...", "B" and a line break), by one
    that it states ("Answer: B", "The answer is (B).", "B is correct"), or by being the option's text, alone or after
    a letter or such words, but for case, white space and the full stop at its end. A text that names several names
    none: "A, B", "C. bird or D. fish", a repetition of the options, "B. cat" where "cat" is A's text, an option's
    text that is given twice. What takes its letter back names none either: "A. not a cat", "A. cat, dog". A letter
    alone is a letter, even if an option's text is one too, and so is one with its own option's text; "C. Darwin" is
    the option of that text, unless "Darwin" is C's.

    Args:
        options: texts of the options A, B, ...; at most 26.
    """
    text = plain(text).translate(_EMPHASIS).strip(" \t\r\n\"'")
    letters = string.ascii_uppercase[: len(options)]
    by_text: dict[str, set[str]] = {}
    for letter, option in zip(letters, options, strict=True):
        if name := normalise(plain(option)):  # else an empty answer would name it
            by_text.setdefault(name, set()).add(letter)
    lead = _LEAD.match(text)
    body = text[lead.end() :] if lead else text
    found = leading_letter(body)
    if found and found[0] in letters and not found[1].strip(" )].:,;!-\n。、：，；"):
        return found[0]
    own = found[0] if found and found[0] in by_text.get(normalise(found[1]), ()) else None  # "B. cat", cat being B
    whole = by_text.get(normalise(text), set()) | by_text.get(normalise(body), set())
    if len(whole) == 1 and not own:
        return whole.pop()
    if own and not whole:
        return own
    if (beside := _WITH_TEXT.fullmatch(body)) and beside[1].upper() in by_text.get(normalise(beside[2]), ()):
        return beside[1].upper()  # "B cat"
    named = whole | first_letters(body) | {(match[1] or match[2]).upper() for match in _STATED.finditer(text)}
    if found:
        named |= by_text.get(normalise(found[1]), set())
        if is_taken_back(found[0], found[1], options):
            return None
    called = {match[1] for match in _CALLED_RIGHT.finditer(text)}
    if _CALLED_RIGHT.match(text):
        named |= called
    others = (listed_letters(body, options) | called) & set(letters)
    return named.pop() if len(named) == 1 and others <= named <= set(letters) else None


def choice_match(prediction: str, options: Sequence[str], answer: str) -> bool:
    """Whether a prediction names the right option, by `read_choice`.

    Accuracy of ScienceQA (Lu et al. 2022), SEED-Bench (Li et al. 2023), MMBench, and IconQA with choices is the mean of
    these. Their scripts end in guesses, which are left out here: ScienceQA's draws a letter where it finds none,
    MMBench's asks a language model and then draws one. SEED-Bench's compares the losses of the options' texts instead
    of reading an answer.

    Args:
        answer: the right option's letter.
    """
    return read_choice(prediction, options) == answer.strip().upper()


def circular(
    results: Iterable[tuple[Hashable, bool]], rotations: Mapping[Hashable, int] | None = None
) -> dict[Hashable, bool]:
    """Which questions of MMBench (Liu et al. 2023, CircularEval) or CCBench count as right: all rotations were.

    A question with n options is asked n times, with its options moved on by one each time; only if every answer is
    right is the question. The accuracy is the mean of the values.

    Args:
        results: (question, whether this rotation was answered right), in any order. `mmbench_question` gives the first.
        rotations: how often each question was to be asked; one with fewer answers is wrong. None: as often as it was.
    """
    answers: dict[Hashable, list[bool]] = {}
    for question, right in results:
        answers.setdefault(question, []).append(right)
    for question in rotations or ():
        answers.setdefault(question, [])
    return {
        question: all(rights) and len(rights) >= (rotations or {}).get(question, 1)
        for question, rights in answers.items()
    }


def mmbench_question(index: int) -> int:
    """The question that a row of MMBench's table belongs to: rotations have its index plus a multiple of a million."""
    return index % 1_000_000


def scienceqa_summary(results: Iterable[tuple[bool, str, bool, bool, int]]) -> dict[str, float]:
    """Accuracies in 0..1 of ScienceQA's table (Lu et al. 2022, table 3): the columns of its `evaluate_acc.py`.

    Args:
        results: for each question: whether it was answered right, its subject ("natural science", "social science",
            "language science"), whether it has a hint (context as text), whether it has an image, its grade 1 to 12.

    Returns:
        `average`; by subject `NAT`, `SOC`, `LAN`; by context `TXT`, `IMG` (a question can be in both), `NO`; by grade
        `G1-6`, `G7-12`. `IMG` is what is reported of models that are asked only the questions with images.
    """
    subjects = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
    scores: list[tuple[str, float]] = []
    for right, subject, hint, image, grade in results:
        names = ["average", subjects[subject], "G1-6" if grade <= 6 else "G7-12"]
        names += ["TXT"] * hint + ["IMG"] * image + ["NO"] * (not hint and not image)
        scores += [(name, float(right)) for name in names]
    return mean_by(scores)
