"""Turns -> one string, with the ranges of characters that are answers.

The original's format (LLaMA2-Accessory, `accessory/data/conversation`): the system text, then `\n\n###` +
` Human: question\n###` + ` Assistant:` + ` answer\n###`, further turns in the same way. An answer is supervised
together with its ending `\n###`. Without a system text a conversation starts with `###` alone.

What data and users write never becomes structure: `escaped` changes what would read as the end of a turn or as the
beginning of one. All other text is as in the original. A plain document has no structure, and its text stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sphinx_pl.data.schema import Turn

SEPARATOR = "###"
END_OF_TURN = "\n" + SEPARATOR
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text; `answers` are half-open character ranges to supervise.

    `escaped`: whether a text of the turns would have become structure.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    escaped: bool = False


# Full-width signs are what some tokenizers take for a number sign, and sentencepiece takes U+2581 for a space.
_SEPARATORS = "[#\uff03\ufe5f]{3}"
_STRUCTURE = re.compile(f"\n(?={_SEPARATORS})|(?<={SEPARATOR})[ \u2581](?=(?:Human|Assistant):)")
_ESCAPED = re.compile(f"\n (?={_SEPARATORS})")


def escaped(text: str) -> str:
    """A text that cannot end a turn or begin one, in which a space is added where this one does.

    It stands before a `###` that begins a line, which Markdown still reads as a heading, and between `###` and the
    words ` Human:` or ` Assistant:` on any place of a line.
    """
    return _STRUCTURE.sub(r"\g<0> ", text)


def unescaped(text: str) -> str:
    """What the model wrote, with a `###` at the beginning of its line again."""
    return _ESCAPED.sub("\n", text)


def is_document(turns: Sequence[Turn]) -> bool:
    """Whether a single answer to no question: plain text, not a conversation.

    A question of nothing but marks for images is one, and an empty one in any conversation.
    """
    return len(turns) == 1 and not turns[0].question.strip()


def render(turns: Sequence[Turn], system: str, open_ended: bool = False, document: bool | None = None) -> Rendered:
    """A conversation; with `open_ended` the last turn stops where the model is to answer.

    A plain document is its text alone, all supervised, behind the marks of its images; it is open-ended from its start.

    Args:
        system: the text before the first turn, which stays as it is.
        document: whether it is one; None: as `is_document` says of `turns`.
    """
    if is_document(turns) if document is None else document:
        marks, text = turns[0].question, turns[0].answer
        return Rendered(marks, ()) if open_ended else Rendered(marks + text, ((len(marks), len(marks + text)),))
    text = f"{system}\n\n{SEPARATOR}" if system else SEPARATOR
    answers: list[tuple[int, int]] = []
    changed = False
    for i, turn in enumerate(turns):
        question, answer = escaped(turn.question), escaped(turn.answer)
        changed |= (question, answer) != (turn.question, turn.answer)
        text += f" Human: {question}{END_OF_TURN} Assistant:"
        if open_ended and i == len(turns) - 1:
            break
        start = len(text)
        text += f" {answer}{END_OF_TURN}"
        answers.append((start, len(text)))
    return Rendered(text, tuple(answers), changed)
