"""A sentencepiece tokenizer that knows where in the text each id comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece as spm

from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_pointer


class Tokenizer:
    """A tokenizer with LLaMA's conventions: the caller puts BOS in front, and sentencepiece's dummy
    prefix stays.

    Raises:
        UserError: the file is missing, or is not a sentencepiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"tokenizer: no file at {self.path}; give a sentencepiece tokenizer.model "
                "(for the sample data run `python -m sphinx_pl.cli.sample`)"
            )
        check_pointer(self.path)
        self._model = spm.SentencePieceProcessor()
        try:
            self._model.Load(str(self.path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer: {self.path} is not a sentencepiece model ({error})") from None
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.vocab_size: int = self._model.vocab_size()
        self.longest_piece: int = max(len(self._model.IdToPiece(i)) for i in range(self.vocab_size))

    def __reduce__(self) -> tuple[Any, ...]:  # each data worker loads the file itself
        return (Tokenizer, (self.path,))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.EncodeAsIds(text)
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each id the half-open range of characters of `text` that it stands for."""
        mapping = self._model.EncodeAsOffsetMapping(text)
        ids: list[int] = mapping["ids"]
        # If a character is written as several bytes, all pieces but the last have no width. They
        # get the character.
        return ids, [(begin, max(end, begin + 1)) for begin, end in mapping["offsets"]]

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.DecodeIds([i for i in ids if 0 <= i < self.vocab_size])
        return text

    def piece(self, id: int) -> str | bytes:
        """The text of one id with the space that it begins with; the byte, if the id stands for one
        byte."""
        piece: str = self._model.IdToPiece(id)
        return bytes([int(piece[3:-1], 16)]) if self._model.IsByte(id) else piece.replace("\u2581", " ")

    def is_special(self, id: int) -> bool:
        """Whether an id stands for no text: a mark such as `<s>`, or the unknown id."""
        return bool(self._model.IsControl(id) or self._model.IsUnknown(id))
