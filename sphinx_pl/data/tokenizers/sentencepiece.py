"""SentencePiece's tokenizer.model, with LLaMA's conventions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece as spm

from sphinx_pl.data.tokenizers.base import ControlToken, Span, Tokenizer
from sphinx_pl.utils.errors import UserError

TOKENIZER_MODEL = "tokenizer.model"
_CONTROL = 3  # the kind of piece, in SentencePiece's files


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer that keeps sentencepiece's dummy prefix: a space in front of every text.

    Raises:
        UserError: the file is not a sentencepiece model.
    """

    def __init__(self, path: Path, files: Mapping[str, bytes], controls: Iterable[str] = ()) -> None:
        super().__init__(path, files, controls)
        self._model = self._load(self.files[TOKENIZER_MODEL])
        if self._wanted:
            self._control(self._wanted)
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id()
        self.eos_ids = (self.eos_id,)
        self.vocab_size = self._model.vocab_size()
        pieces = [self._model.IdToPiece(id) for id in range(self.vocab_size)]
        self.longest_piece = max(map(len, pieces))
        self.controls = {name: ControlToken(id) for id, name in enumerate(pieces) if self._model.IsControl(id)}
        marks = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._model.unk_id()}
        self.named_tokens = {name: pieces[id] for name, id in marks.items() if id is not None and id >= 0}

    def _load(self, content: bytes) -> spm.SentencePieceProcessor:
        model = spm.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(content)
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer: {self.path} is not a sentencepiece model ({error})") from None
        return model

    def _control(self, names: Iterable[str]) -> None:
        """Make `names` control pieces; the file changes only if it gets new ones."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        proto = ModelProto()
        proto.ParseFromString(self.files[TOKENIZER_MODEL])
        pieces = {piece.piece: piece for piece in proto.pieces}
        self.new_tokens = [name for name in names if name not in pieces]
        for name in self.new_tokens:
            proto.pieces.add(piece=name, score=0.0, type=_CONTROL)
        if self.new_tokens:
            proto.trainer_spec.vocab_size = len(proto.pieces)
            self.files[TOKENIZER_MODEL] = proto.SerializeToString(deterministic=True)
        for name in names:
            if name in pieces:
                pieces[name].type = _CONTROL
        self._model = self._load(proto.SerializeToString(deterministic=True))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.EncodeAsIds(text)
        return ids

    def _encode_text(self, text: str, begins: bool) -> tuple[list[int], list[Span]]:
        mapping = self._model.EncodeAsOffsetMapping(text)
        ids: list[int] = mapping["ids"]
        # If a character is written as several bytes, all pieces but the last have no width. They
        # get the character.
        return ids, [(begin, max(end, begin + 1)) for begin, end in mapping["offsets"]]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.DecodeIds([i for i in ids if 0 <= i < self.vocab_size])
        return text

    def piece(self, id: int) -> str | bytes:
        piece: str = self._model.IdToPiece(id)
        return bytes([int(piece[3:-1], 16)]) if self._model.IsByte(id) else piece.replace("\u2581", " ")

    def is_special(self, id: int) -> bool:
        return bool(self._model.IsControl(id) or self._model.IsUnknown(id))
