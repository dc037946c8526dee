"""The prompt format: turns -> one string, with the ranges of characters that are answers.

The format is the original's (LLaMA2-Accessory, `accessory/data/conversation`): the system text,
then `\n\n###` + ` Human: question\n###` + ` Assistant:` + ` answer\n###`, and further turns in the
same way. An answer is supervised together with its ending `\n###`. Without a system text, a
conversation starts with `###` alone.

What data and users write never becomes structure: `escaped` changes text that would read as the end
or the beginning of a turn. All other text is as in the original. A plain document has no structure,
so its text is not changed.
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
    """A conversation as text. `answers` are the half-open ranges of characters to supervise.

    `escaped` says whether a text of the turns would have become structure.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    escaped: bool = False


# Some tokenizers take full-width signs for a number sign, and sentencepiece takes U+2581 for a
# space.
_SEPARATORS = "[#\uff03\ufe5f]{3}"
_STRUCTURE = re.compile(f"\n(?={_SEPARATORS})|(?<={SEPARATOR})[ \u2581](?=(?:Human|Assistant):)")
_ESCAPED = re.compile(f"\n (?={_SEPARATORS})")


def escaped(text: str) -> str:
    """The text with added spaces, so that it cannot end or begin a turn.

    A space is added before a `###` that begins a line, which Markdown still reads as a heading.
    Another is added between `###` and ` Human:` or ` Assistant:` anywhere in a line.
    """
    return _STRUCTURE.sub(r"\g<0> ", text)


def unescaped(text: str) -> str:
    """The model's text without the space that `escaped` adds before a `###` at the beginning of a
    line."""
    return _ESCAPED.sub("\n", text)


def is_document(turns: Sequence[Turn]) -> bool:
    """Whether the turns are a plain document: a single answer to an empty question.

    A question of nothing but marks for images is not empty.
    """
    return len(turns) == 1 and not turns[0].question.strip()


def render(turns: Sequence[Turn], system: str, open_ended: bool = False, document: bool | None = None) -> Rendered:
    """The text of a conversation; with `open_ended` the last turn stops where the model answers.

    A plain document is its text behind the marks of its images, and all of it is supervised.
    Open-ended, it is the marks alone.

    Args:
        system: the text before the first turn; it is not escaped.
        document: whether the turns are a plain document; None: `is_document` decides.
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
