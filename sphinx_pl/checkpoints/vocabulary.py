"""Which token has which id, from whatever files of a folder say it: two tokenizers in different
files can be compared.

`sphinx_pl.checkpoints.huggingface.tokenizer_difference` compares files that both folders have. The
other cases are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece as spm

from sphinx_pl.checkpoints.folder import read_json

ADDED = "added_tokens.json"
CONFIG = "tokenizer_config.json"
FAST = "tokenizer.json"
VOCABULARIES = (
    FAST,
    "*.model",
    "*.spm",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "vocab.bpe",
    "bpe.codes",
    "tekken.json",
)
"""Files that hold a whole vocabulary: the best one first."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by their ids.

    Attributes:
        files: names of all files that hold a vocabulary.
        file: the one that `tokens` are of; "" where none can be read.
        added: tokens beside the vocabulary, with the file that names them.
    """

    files: frozenset[str]
    file: str
    tokens: Mapping[int, str]
    added: Mapping[int, tuple[str, str]]

    def token(self, id: int) -> tuple[str, str] | None:
        """The token of an id, and the file that says it."""
        if id in self.added:
            return self.added[id]
        return (self.tokens[id], self.file) if id in self.tokens else None

    @property
    def shifted(self) -> set[int]:
        """Ids that the folder names twice: its model's ids are not its vocabulary file's."""
        return {id for id, (token, _) in self.added.items() if self.tokens.get(id, token) != token}


def read_vocabulary(folder: Path) -> Vocabulary:
    """Raises: UserError: a JSON file is damaged."""
    files = [file for pattern in VOCABULARIES for file in sorted(folder.glob(pattern)) if file.is_file()]
    added: dict[int, tuple[str, str]] = {}
    for name in (FAST, CONFIG, ADDED):
        if (folder / name).is_file():
            added |= {id: (token, name) for id, token in _added(name, read_json(folder / name)).items()}
    for file in files:
        if tokens := _tokens(file):
            return Vocabulary(frozenset(f.name for f in files), file.name, tokens, added)
    return Vocabulary(frozenset(f.name for f in files), "", {}, added)


def _added(name: str, content: Mapping[str, Any]) -> dict[int, str]:
    try:
        if name == ADDED:
            return {int(id): str(token) for token, id in content.items()}
        if name == FAST:
            return {int(entry["id"]): str(entry["content"]) for entry in content.get("added_tokens") or ()}
        entries = content.get("added_tokens_decoder") or {}
        return {int(id): str(entry["content"] if isinstance(entry, dict) else entry) for id, entry in entries.items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}  # in a form that nobody here knows


def _tokens(file: Path) -> dict[int, str]:
    """The tokens of a vocabulary file; {} if it cannot be read."""
    try:
        if file.suffix in (".model", ".spm"):
            model = spm.SentencePieceProcessor(model_proto=file.read_bytes())
            return {id: model.IdToPiece(id) for id in range(model.vocab_size())}
        if file.name == FAST:
            vocab = (read_json(file).get("model") or {}).get("vocab") or {}
            if isinstance(vocab, list):  # a unigram model's: pieces with their scores, in order
                return {id: str(piece[0]) for id, piece in enumerate(vocab)}
            return {int(id): str(token) for token, id in vocab.items()}
        if file.name == "vocab.json":
            return {int(id): str(token) for token, id in read_json(file).items()}
        if file.name == "vocab.txt":
            return dict(enumerate(file.read_text(encoding="utf-8").splitlines()))
    except (RuntimeError, OSError, TypeError, ValueError, IndexError, AttributeError):
        pass
    return {}


def vocabulary_difference(a: Path, b: Path) -> str:
    """A phrase with an id that has two tokens in two folders; "" if there is none.

    Folders that share a vocabulary file are compared by their added tokens only. An id that only
    one folder knows contradicts nothing.
    """
    x, y = read_vocabulary(a), read_vocabulary(b)
    ids = x.added.keys() | y.added.keys()
    if not x.files & y.files:
        ids |= x.tokens.keys() & y.tokens.keys()
    for id in sorted(ids - x.shifted - y.shifted):
        first, second = x.token(id), y.token(id)
        if first and second and first[0] != second[0]:
            return f"token {id} is {first[0]!r} ({first[1]}) and {second[0]!r} ({second[1]})"
    return ""


def uncompared(a: Path, b: Path) -> str:
    """The reason why two folders' tokenizers could not be compared wholly; "" if they could."""
    x, y = read_vocabulary(a), read_vocabulary(b)
    if bool(x.files) != bool(y.files):
        return f"only '{a if x.files else b}' has a tokenizer ({', '.join(sorted(x.files or y.files))})"
    if x.files and not x.files & y.files and not (x.tokens and y.tokens):
        unread = x.files if not x.tokens else y.files
        return f"their tokenizers cannot be compared ({', '.join(sorted(unread))} is not read here)"
    for one, other, folder in ((x, y, a), (y, x, b)):
        more = [token for id, (token, _) in one.added.items() if other.token(id) is None and other.tokens]
        if more:
            return f"only the tokenizer of '{folder}' has {', '.join(map(repr, more[:3]))}"
    return ""
