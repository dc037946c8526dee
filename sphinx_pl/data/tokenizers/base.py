"""What every tokenizer offers, and how control tokens are kept apart from text.

A control token, such as `<|im_end|>`, stands for structure. It is looked for only in ranges of
characters that the caller names, those that a prompt format writes. The same characters anywhere
else are text and get the ids of text.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

Span = tuple[int, int]
"""A half-open range of characters."""

# Unicode's White_Space, which `\s` of Python's `re` exceeds.
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that stands for structure. `lstrip` and `rstrip`: it takes the white space beside
    it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class Tokenizer(ABC):
    """A tokenizer of any kind. No method adds BOS or EOS: the caller does.

    Args:
        path: the file that it was read from.
        files: names and contents of the files that a checkpoint's folder gets.
        controls: names that have to be control tokens. A name that the vocabulary lacks becomes a
            new token behind all others.
    """

    vocab_size: int
    """One more than the largest id, new tokens included."""
    bos_id: int | None
    eos_id: int
    eos_ids: tuple[int, ...]
    """All ids that end a text, `eos_id` first."""
    longest_piece: int
    """The most characters that an id of text stands for."""
    controls: Mapping[str, ControlToken]
    """The control tokens by name."""
    added_tokens: Sequence[str] = ()
    """Tokens of the vocabulary that were added to it and are not control tokens."""
    new_tokens: Sequence[str] = ()
    """The control tokens that `files` did not have."""
    chat_template: str | None = None
    """The model's own prompt format, in Jinja."""
    named_tokens: Mapping[str, str] = {}
    """What a chat template may refer to: `bos_token`, `eos_token` and so on, by these names."""

    def __init__(self, path: Path, files: Mapping[str, bytes], controls: Iterable[str] = ()) -> None:
        self.path = path
        self.files = dict(files)
        self._wanted = tuple(dict.fromkeys(controls))

    def __reduce__(self) -> tuple[Any, ...]:  # for each data worker
        return (type(self), (self.path, self.files, self._wanted))

    def with_controls(self, names: Iterable[str]) -> Self:
        """This tokenizer, in which `names` are control tokens."""
        names = [name for name in names if name not in self.controls]
        return type(self)(self.path, self.files, [*self._wanted, *names]) if names else self

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files into a checkpoint's folder."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    # -- encoding ----------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The ids of a text, of which none is a control token's."""
        return self.encode_with_spans(text)[0]

    def encode_with_spans(
        self, text: str, structure: Sequence[Span] = (), begins: bool = True
    ) -> tuple[list[int], list[Span]]:
        """The ids, and for each id the half-open range of characters of `text` that it stands for.

        Args:
            structure: the ranges in which control tokens are looked for, in order.
            begins: whether the text stands at the beginning of what the model reads. Some
                tokenizers put a space in front of that.
        """
        ids: list[int] = []
        spans: list[Span] = []
        place = 0
        for begin, end, token in self._control_tokens(text, structure):
            before = begin
            if token.lstrip:
                before -= len(re.search(f"{_SPACE}\\Z", text[place:begin])[0])  # type: ignore[index]
            self._append(text, place, before, begins, ids, spans)
            ids.append(token.id)
            spans.append((begin, end))
            place = end + len(re.match(_SPACE, text[end:])[0]) if token.rstrip else end  # type: ignore[index]
        self._append(text, place, len(text), begins, ids, spans)
        return ids, spans

    def _append(self, text: str, begin: int, end: int, begins: bool, ids: list[int], spans: list[Span]) -> None:
        if begin < end:
            more, places = self._encode_text(text[begin:end], begins and begin == 0)
            ids += more
            spans += [(a + begin, b + begin) for a, b in places] if begin else places

    def _control_tokens(self, text: str, structure: Sequence[Span]) -> list[tuple[int, int, ControlToken]]:
        """(begin, end, token) of each control token within `structure`."""
        if not self.controls:
            return []
        names = re.compile("|".join(map(re.escape, sorted(self.controls, key=len, reverse=True))))
        return [
            (*match.span(), self.controls[match[0]])
            for begin, end in structure
            for match in names.finditer(text, begin, end)
        ]

    @abstractmethod
    def _encode_text(self, text: str, begins: bool) -> tuple[list[int], list[Span]]:
        """Ids and spans of a text that holds no structure."""

    # -- decoding ----------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Control tokens, and ids that the vocabulary lacks, stand for none."""

    @abstractmethod
    def piece(self, id: int) -> str | bytes:
        """The text of one id with the space that it begins with; bytes, if they are no whole
        characters."""

    @abstractmethod
    def is_special(self, id: int) -> bool:
        """Whether an id stands for no text: a mark such as `<s>`, or the unknown id."""
