"""Tokenizers in different files, and what lies beside the weights."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import torch
from tokenizers import Tokenizer, models

from sphinx_pl.checkpoints.vocabulary import uncompared, vocabulary_difference
from sphinx_pl.mixing.mix import mix_checkpoints
from sphinx_pl.utils.errors import UserError
from tests.mixing.conftest import huggingface_folder

PIECES = Path(__file__).parent.parent / "golden" / "tokenizer.model"


def vocabulary() -> dict[str, int]:
    model = spm.SentencePieceProcessor(model_file=str(PIECES))
    return {model.IdToPiece(id): id for id in range(model.vocab_size())}


def folder(path: Path, files: dict[str, Any]) -> Path:
    huggingface_folder(path, {"w": torch.full((4,), float(len(path.name)))})
    for name, content in files.items():
        if content == "pieces":
            (path / name).write_bytes(PIECES.read_bytes())
        else:
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def fast(vocab: dict[str, int]) -> str:
    text: str = Tokenizer(models.WordLevel(vocab, unk_token="<unk>")).to_str()
    return text


def decoder(**tokens: str) -> dict[str, Any]:
    return {"added_tokens_decoder": {id.strip("_"): {"content": token} for id, token in tokens.items()}}


OTHER = {"<unk>": 0, "wort": 1, "satz": 2}


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ({"tokenizer.model": "pieces"}, {"tokenizer.json": fast(vocabulary())}, ""),
        (
            {"tokenizer.model": "pieces"},
            {"tokenizer.json": fast(OTHER)},
            "token 1 is '<s>' (tokenizer.model) and 'wort'",
        ),
        ({"tokenizer.model": "pieces"}, {"vocab.json": OTHER, "merges.txt": ""}, "token 1 is '<s>'"),
        ({"vocab.txt": "<unk>\nwort\nsatz"}, {"tokenizer.json": fast(OTHER)}, ""),
        ({"vocab.txt": "<unk>\nsatz\nwort"}, {"tokenizer.json": fast(OTHER)}, "token 1 is 'satz'"),
        (
            {"tokenizer_config.json": decoder(_9="<a>")},
            {"tokenizer_config.json": decoder(_9="<b>")},
            "token 9 is '<a>'",
        ),
        ({"tokenizer_config.json": decoder(_9="<a>")}, {"added_tokens.json": {"<b>": 9}}, "token 9 is '<a>'"),
        ({"tokenizer_config.json": decoder(_9="<a>")}, {"added_tokens.json": {"<a>": 9}}, ""),
        ({"tokenizer_config.json": decoder(_9="<a>")}, {"tokenizer_config.json": {}}, ""),
        ({"tokenizer_config.json": decoder(_1="<a>")}, {"vocab.json": OTHER}, "token 1 is '<a>'"),
    ],
)
def test_tokens_of_one_id(tmp_path: Path, a: dict[str, Any], b: dict[str, Any], difference: str) -> None:
    paths = [folder(tmp_path / "a", a), folder(tmp_path / "bb", b)]
    found = vocabulary_difference(*paths)
    assert found.startswith(difference) if difference else not found
    assert bool(vocabulary_difference(*paths[::-1])) == bool(difference)
    if difference:
        with pytest.raises(UserError, match="cannot be mixed: their tokenizers differ: token") as error:
            mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
        assert "\n" not in str(error.value)
    else:
        mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")


def test_ids_that_a_model_shifts_are_not_compared(tmp_path: Path) -> None:
    """XLM-R's ids are not those of its SentencePiece file."""
    shifted = {"sentencepiece.bpe.model": "pieces", "tokenizer_config.json": decoder(_0="<s>", _1="<pad>")}
    a = folder(tmp_path / "a", shifted)
    assert vocabulary_difference(a, folder(tmp_path / "b", {"sentencepiece.bpe.model": "pieces"})) == ""


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({}, {"tokenizer.model": "pieces"}, r"only '.*/bb' has a tokenizer \(tokenizer\.model\)"),
        ({"tokenizer.json": fast(OTHER)}, {}, r"only '.*/a' has a tokenizer \(tokenizer\.json\)"),
        ({"tekken.json": "{}"}, {"tokenizer.model": "pieces"}, r"cannot be compared \(tekken\.json is not read here\)"),
        (
            {"vocab.json": OTHER},
            {"vocab.json": OTHER, "added_tokens.json": {"<pad>": 3}},
            "only the tokenizer of '.*/bb'",
        ),
        ({"chat_template.jinja": "a"}, {"chat_template.jinja": "b"}, r"chat_template\.jinja \(differ\)"),
        ({"preprocessor_config.json": {"size": 1}}, {"preprocessor_config.json": {"size": 2}}, "preprocessor_config"),
        ({"generation_config.json": {"top_k": 1}}, {}, r"generation_config\.json \(only in '.*/a'\)"),
        ({}, {"special_tokens_map.json": {}}, r"special_tokens_map\.json \(only in '.*/bb', and left there\)"),
    ],
)
def test_what_else_differs_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, a: dict[str, Any], b: dict[str, Any], said: str
) -> None:
    paths = [folder(tmp_path / "a", a), folder(tmp_path / "bb", b)]
    with caplog.at_level(logging.WARNING):
        mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    (line,) = caplog.messages
    assert re.search(said, line), line
    assert "\n" not in line


def test_folders_that_say_the_same_are_mixed_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "tokenizer.model": "pieces",
        "generation_config.json": {"top_k": 1},
        "tokenizer_config.json": decoder(_9="<a>"),
    }
    other = files | {"generation_config.json": {"transformers_version": "5", "top_k": 1}}
    mix_checkpoints([folder(tmp_path / "a", files), folder(tmp_path / "b", other)], [0.5, 0.5], tmp_path / "out")
    assert not caplog.messages
    assert uncompared(tmp_path / "a", tmp_path / "b") == ""
