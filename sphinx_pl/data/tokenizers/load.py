"""Finds, reads and copies the tokenizer of a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx_pl.data.tokenizers.base import Tokenizer
from sphinx_pl.data.tokenizers.huggingface import BESIDE, TOKENIZER_JSON, HuggingFaceTokenizer
from sphinx_pl.data.tokenizers.sentencepiece import TOKENIZER_MODEL, SentencePieceTokenizer
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_pointer


def find_tokenizer(folder: Path) -> Path:
    """The file of a folder that holds its tokenizer: tokenizer.json, which names the tokens that
    were added too, else tokenizer.model, whether or not it is there."""
    there = folder / TOKENIZER_JSON
    return there if there.is_file() else folder / TOKENIZER_MODEL


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file or a folder: SentencePiece's model, or Hugging Face's tokenizer.json.

    Raises:
        UserError: the file is missing, or is not a tokenizer.
    """
    path = Path(path)
    path = find_tokenizer(path) if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"tokenizer: no file at {path}; give a sentencepiece tokenizer.model or Hugging Face's tokenizer.json "
            "(for the sample data run `python -m sphinx_pl.cli.sample`)"
        )
    for file in tokenizer_files(path):
        check_pointer(file)
    if path.suffix == ".json":
        files = {file.name: file.read_bytes() for file in tokenizer_files(path)}
        return HuggingFaceTokenizer(path, {TOKENIZER_JSON: files.pop(path.name), **files})
    return SentencePieceTokenizer(path, {TOKENIZER_MODEL: path.read_bytes()})


def copy_tokenizer(tokenizer: Path | Tokenizer, folder: Path) -> None:
    """Write a tokenizer, or copy the files of one, into a checkpoint's folder, under the names that
    they have there."""
    if isinstance(tokenizer, Tokenizer):
        tokenizer.write(folder)
        return
    name = TOKENIZER_JSON if tokenizer.suffix == ".json" else TOKENIZER_MODEL
    for file in tokenizer_files(tokenizer):
        shutil.copyfile(file, folder / (name if file == tokenizer else file.name))


def tokenizer_files(path: Path) -> list[Path]:
    """A tokenizer's file, and those beside it that are part of it."""
    beside = [path.with_name(name) for name in BESIDE] if path.suffix == ".json" else []
    return [path, *(file for file in beside if file.is_file())]
