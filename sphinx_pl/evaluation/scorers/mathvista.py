"""MathVista (Lu et al. 2023): answers read without a language model as judge, and the official comparison.

Official: `extract_answer.py` and `calculate_score.py`. The first reads what it can by rules and asks a language model
for the rest; the second brings what was read to the form of the answer, and takes the option at the least edit
distance where it is none of them. Both are guesses: here such an answer stays unread, and a report should give their
number.
"""

from __future__ import annotations

import ast
import math
import re
import string
from collections.abc import Sequence

from sphinx_pl.evaluation.scorers.choices import read_choice

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_STATED = re.compile(r"\banswer(?:\s+is|\s*:|\s+is\s*:)\s*(.*)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,/])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?![\d/]|[.,]\d)")
_LIST = re.compile(r"\[[^\[\]]*\]")


def read_answer(
    text: str, question_type: str, answer_type: str, choices: Sequence[str] = (), precision: int | None = None
) -> str | None:
    """What a response says, in the form of the data set's answers; None if it does not say it in so many words.

    An option by its letter or text (`read_choice`); a number if it is all of the text, what the text states ("The
    answer is 14 cm."), or the only one in it; a list in brackets, likewise the only one. Numbers may have thousands
    separators and may be followed by a unit; whole numbers are cut off (14.7 is 14) and others rounded, as the
    official script does.

    Args:
        question_type: "multi_choice" or "free_form".
        answer_type: "text", "integer", "float" or "list".
        choices: the options' texts, of multiple choice.
        precision: decimals of a float.
    """
    if quoted := _QUOTED.search(text):
        text = quoted[1]
    if question_type == "multi_choice":
        letter = read_choice(text, choices)
        return None if letter is None else choices[string.ascii_uppercase.index(letter)]
    if answer_type in ("integer", "float"):
        found = _only_number(text)
        return None if found is None or not math.isfinite(found) else written(found, answer_type, precision)
    if answer_type == "list":
        return _only_list(text)
    return text.strip() or None


def written(value: float, answer_type: str, precision: int | None) -> str:
    """A number as the data set writes it: `normalize_extracted_answer` of `calculate_score.py`."""
    return str(int(value)) if answer_type == "integer" else str(round(value, precision))


def mathvista_match(answer_read: str | None, answer: str) -> bool:
    """Whether what `read_answer` gave is the answer but for blanks around: `safe_equal` of `calculate_score.py`."""
    return answer_read is not None and answer_read.strip() == answer.strip()


def _only_number(text: str) -> float | None:
    for part in (*(match[1] for match in _STATED.finditer(text)), text):
        numbers = {float(match[0].replace(",", "")) for match in _NUMBER.finditer(part)}
        if len(numbers) == 1:
            return numbers.pop()
    return None


def _only_list(text: str) -> str | None:
    found = {str(values) for match in _LIST.finditer(text) if (values := _literal(match[0])) is not None}
    return found.pop() if len(found) == 1 else None


def _literal(text: str) -> list[object] | None:
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return values if isinstance(values, list) else None
