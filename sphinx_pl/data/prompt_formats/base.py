"""What a prompt format offers.

A format writes structure: marks of roles and ends of turns. What data and users write never becomes
structure. Control tokens are looked for in structure alone (`sphinx_pl.data.tokenizers`). Structure
that is plain text, such as `USER:`, is escaped where somebody else writes it. All other text stays
as it is. A plain document has no structure, so its text is not changed.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sphinx_pl.data.schema import Turn
from sphinx_pl.data.tokenizers.base import Span


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    Attributes:
        answers: the half-open ranges of characters to supervise, each with the end of its turn.
        contents: the ranges of the answers' own texts within these.
        structure: the ranges that the format wrote.
        escaped: whether a text of the turns would have become structure.
    """

    text: str
    answers: tuple[Span, ...]
    contents: tuple[Span, ...] = ()
    structure: tuple[Span, ...] = ()
    escaped: bool = False


class PromptFormat(ABC):
    """How a conversation is written for the model."""

    name: str
    bos: bool
    """Whether BOS, which is no part of the text, stands in front of it."""
    begins: bool = True
    """Whether the text counts as the beginning of what the model reads, see
    `Tokenizer.encode_with_spans`. It does not behind a BOS that a chat template writes as text."""
    end: str
    """What ends an answer, and is supervised with it."""
    controls: tuple[str, ...] = ()
    """The control tokens that the format writes."""
    markers: Markers

    @property
    def ends_in_text(self) -> bool:
        """Whether `end` is text, and no control token."""
        return not any(self.end.endswith(name) for name in self.controls)

    def escape(self, text: str) -> str:
        """The text with added spaces, so that it cannot end or begin a turn."""
        return self.markers.escape(text)

    def unescape(self, text: str) -> str:
        """The model's text without the spaces that `escape` adds."""
        return self.markers.unescape(text)

    def check(self, system: str) -> None:
        """Raises: UserError: the format has no place for this system text."""
        return None

    def render(
        self, turns: Sequence[Turn], system: str, open_ended: bool = False, document: bool | None = None
    ) -> Rendered:
        """The text of a conversation; with `open_ended` the last turn stops where the model
        answers.

        A plain document is its text behind the marks of its images, and all of it is supervised.
        Open-ended, it is the marks alone.

        Args:
            system: the text before the first turn; it is not escaped.
            document: whether the turns are a plain document; None: `is_document` decides.

        Raises:
            SkipSample: the format cannot write these turns.
        """
        if is_document(turns) if document is None else document:
            marks, text = turns[0].question, turns[0].answer
            whole = ((len(marks), len(marks + text)),)
            return Rendered(marks, ()) if open_ended else Rendered(marks + text, whole, whole)
        texts = [Turn(self.escape(turn.question), self.escape(turn.answer)) for turn in turns]
        changed = any(a != b for a, b in zip(texts[:-1], turns[:-1], strict=True))
        changed |= texts[-1].question != turns[-1].question
        changed |= not open_ended and texts[-1].answer != turns[-1].answer
        writing = self._write(texts, system, open_ended)
        return Rendered(
            writing.text, tuple(writing.answers), tuple(writing.contents), tuple(writing.structure), changed
        )

    @abstractmethod
    def _write(self, turns: Sequence[Turn], system: str, open_ended: bool) -> Writing:
        """The text of turns that are escaped."""


@dataclass(slots=True)
class Writing:
    """A text that grows, and its ranges."""

    text: str = ""
    structure: list[Span] = field(default_factory=list)
    answers: list[Span] = field(default_factory=list)
    contents: list[Span] = field(default_factory=list)

    def mark(self, text: str) -> None:
        """Add structure."""
        begin = len(self.text)
        if self.structure and self.structure[-1][1] == begin:
            begin, _ = self.structure.pop()
        self.text += text
        self.structure.append((begin, len(self.text)))

    def answer(self, lead: str, text: str, end: str) -> None:
        """Add what the model learns to write."""
        start = len(self.text)
        self.mark(lead)
        self.contents.append((len(self.text), len(self.text) + len(text)))
        self.text += text
        self.mark(end)
        self.answers.append((start, len(self.text)))


class Markers:
    """Structure that is plain text, such as `USER:` or `[INST]`.

    A space before its last character makes it ordinary text. Some tokenizers take full-width signs
    for ASCII's, and sentencepiece takes U+2581 for a space, so these count too.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        heads = [("".join(map(_alike, text[:-1])), _alike(text[-1])) for text in self.texts]
        self._whole = re.compile("|".join(f"{head}(?={last})" for head, last in heads) or "(?!)")
        self._apart = re.compile("|".join(f"(?<={head}) (?={last})" for head, last in heads) or "(?!)")

    def escape(self, text: str) -> str:
        return self._whole.sub(r"\g<0> ", text)

    def unescape(self, text: str) -> str:
        return self._apart.sub("", text)


def _alike(character: str) -> str:
    if "!" <= character <= "~":
        return f"[{re.escape(character)}{chr(ord(character) + 0xFEE0)}]"
    return "[ \u2581]" if character == " " else re.escape(character)


def plain_markers(literals: Iterable[str], controls: Iterable[str]) -> Markers:
    """The plain text in what a format writes, between its control tokens.

    Words alone, such as the `user` behind `<|im_start|>`, mean nothing without their control token.
    """
    cut = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or "(?!)")
    texts = [text.strip() for literal in literals for text in cut.split(literal)]
    return Markers(text for text in texts if len(text) > 1 and re.search(r"[^\w\s]", text))


def is_document(turns: Sequence[Turn]) -> bool:
    """Whether the turns are a plain document: a single answer to an empty question.

    A question of nothing but marks for images is not empty.
    """
    return len(turns) == 1 and not turns[0].question.strip()
