"""Turns -> one string, with the ranges of characters that are answers.

The original's format (LLaMA2-Accessory, `accessory/data/conversation`): the system text, then `\n\n###` +
` Human: question\n###` + ` Assistant:` + ` answer\n###`, further turns in the same way. An answer is supervised
together with its ending `\n###`. Without a system text a conversation starts with `###` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sphinx_pl.data.record import Turn

SEPARATOR = "###"
END_OF_TURN = "\n" + SEPARATOR
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text; `answers` are half-open character ranges to supervise."""

    text: str
    answers: tuple[tuple[int, int], ...]


def is_document(turns: Sequence[Turn]) -> bool:
    """Whether a single answer to no question: plain text, not a conversation."""
    return len(turns) == 1 and not turns[0].question


def render(turns: Sequence[Turn], system: str, open_ended: bool = False) -> Rendered:
    """A conversation; with `open_ended` the last turn stops where the model is to answer.

    A plain document is its text alone, all supervised; it is open-ended from its start.
    """
    if is_document(turns):
        return Rendered("", ()) if open_ended else Rendered(turns[0].answer, ((0, len(turns[0].answer)),))
    text = f"{system}\n\n{SEPARATOR}" if system else SEPARATOR
    answers: list[tuple[int, int]] = []
    for i, turn in enumerate(turns):
        text += f" Human: {turn.question}{END_OF_TURN} Assistant:"
        if open_ended and i == len(turns) - 1:
            break
        start = len(text)
        text += f" {turn.answer}{END_OF_TURN}"
        answers.append((start, len(text)))
    return Rendered(text, tuple(answers))
