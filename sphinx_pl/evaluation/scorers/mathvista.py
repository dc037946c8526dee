"""MathVista (Lu et al. 2023): answers read without a language model as judge, and the official
comparison.

Official: `extract_answer.py` and `calculate_score.py`. The first reads by rules and asks a language
model where they fail. The second brings the answer to the data set's form, and takes the option at
the least edit distance where it is no option. Both are guesses. Here such an answer counts as
unparsed.
"""

from __future__ import annotations

import ast
import math
import re
import string
from collections.abc import Sequence

from sphinx_pl.data.answer_parsing import read_letter, read_number

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_LIST = re.compile(r"\[[^\[\]]*\]")


def read_answer(
    text: str, question_type: str, answer_type: str, choices: Sequence[str] = (), precision: int | None = None
) -> str | None:
    """The answer that a response gives, in the form of the data set's answers; None if it does not
    say it literally.

    An option is read by its letter or text (`read_letter`), a number by `read_number`. A list in
    brackets must be the only one in the text. Whole numbers are cut off (14.7 is 14) and others
    rounded, as the official script does.

    Args:
        question_type: "multi_choice" or "free_form".
        answer_type: "text", "integer", "float" or "list".
        choices: the options' texts, of multiple choice.
        precision: decimals of a float.
    """
    if quoted := _QUOTED.search(text):
        text = quoted[1]
    if question_type == "multi_choice":
        letter = read_letter(text, choices, stated=True)
        return None if letter is None else choices[string.ascii_uppercase.index(letter)]
    if answer_type in ("integer", "float"):
        number = read_number(text)
        return None if number is None or not math.isfinite(number) else written(number, answer_type, precision)
    if answer_type == "list":
        return _only_list(text)
    return text.strip() or None


def written(value: float, answer_type: str, precision: int | None) -> str:
    """A number as the data set writes it: `normalize_extracted_answer` of `calculate_score.py`."""
    return str(int(value)) if answer_type == "integer" else str(round(value, precision))


def mathvista_match(answer_read: str | None, answer: str) -> bool:
    """Whether what `read_answer` gave is the answer but for blanks around: `safe_equal` of
    `calculate_score.py`."""
    return answer_read is not None and answer_read.strip() == answer.strip()


def _only_list(text: str) -> str | None:
    lists = {str(values) for match in _LIST.finditer(text) if (values := _literal(match[0])) is not None}
    return lists.pop() if len(lists) == 1 else None


def _literal(text: str) -> list[object] | None:
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return values if isinstance(values, list) else None
