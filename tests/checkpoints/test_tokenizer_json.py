"""An exported tokenizer gives the ids of the one that the model was trained with."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sphinx_pl.checkpoints.tokenizer_json import tokenizer_json
from sphinx_pl.utils.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizer.model"
MARKS = ["<s>", "</s>", "<unk>", "<0x41>", "\n###", " Human:", "red", "\u2581", "[0.", "  ", "\n", "é", "日", "🙂"]


def load(file: Path) -> tuple[spm.SentencePieceProcessor, Tokenizer]:
    own = spm.SentencePieceProcessor(model_file=str(file))
    written = Tokenizer.from_str(tokenizer_json(file)[0])
    written.encode_special_tokens = True  # as `split_special_tokens` in tokenizer_config.json has it
    return own, written


@pytest.fixture(scope="module")
def both(sample_data: Path) -> list[tuple[spm.SentencePieceProcessor, Tokenizer]]:
    """LLaMA's kind, and the sample's with symbols of its own."""
    return [load(GOLDEN), load(sample_data / "tokenizer.model")]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=6), st.sampled_from(MARKS), st.integers(0, 511)), max_size=12))
def test_any_text_gives_the_same_ids(
    both: list[tuple[spm.SentencePieceProcessor, Tokenizer]], parts: list[str | int]
) -> None:
    for own, written in both:
        words = (own.IdToPiece(part).replace("\u2581", " ") if isinstance(part, int) else part for part in parts)
        text = "".join(words).encode("utf-8", "ignore").decode()
        ids = own.EncodeAsIds(text)
        assert written.encode(text, add_special_tokens=False).ids == ids
        assert written.encode(text).ids == [own.bos_id(), *ids]
        assert written.decode(ids, skip_special_tokens=False) == own.DecodeIds(ids)


def test_the_samples_own_texts(both: list[tuple[spm.SentencePieceProcessor, Tokenizer]], sample_data: Path) -> None:
    texts = [file.read_text() for file in sorted(sample_data.rglob("*.json"))[:20]]
    assert texts
    for own, written in both:
        for text in texts:
            assert written.encode(text[:5000], add_special_tokens=False).ids == own.EncodeAsIds(text[:5000])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_transformers_loads_it_as_it_stands(tmp_path: Path, sample_data: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    file = sample_data / "tokenizer.model"
    text, config = tokenizer_json(file)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "tokenizer.model").write_bytes(file.read_bytes())
    own, theirs = spm.SentencePieceProcessor(model_file=str(file)), AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for words in (["  two  spaces"], ["x<s>y"], ["red</s>"], *(rng.choices(MARKS, k=5) for _ in range(50))):
        ids = own.EncodeAsIds("".join(words))
        assert theirs("".join(words)).input_ids == [1, *ids]
        assert theirs("".join(words), add_special_tokens=False).input_ids == ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


def trained(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentences = ["the quick brown fox jumps over the lazy dog", "naïve café ２３", "aaa bbb   ccc"] * 30
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 320, "byte_fallback": True, "model_type": "bpe"} | options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"normalization_rule_name": "identity"}, False),  # extra spaces are removed
        ({"normalization_rule_name": "identity", "add_dummy_prefix": False}, False),
        ({"normalization_rule_name": "identity", "byte_fallback": False}, False),
        ({"normalization_rule_name": "identity", "model_type": "unigram", "vocab_size": 300}, True),
        ({"model_type": "word"}, True),
        ({"treat_whitespace_as_suffix": True}, True),
    ],
    ids=str,
)
def test_other_rules_give_the_same_ids_or_are_refused(tmp_path: Path, options: dict[str, Any], refused: bool) -> None:
    file = trained(tmp_path / "tokenizer.model", **options)
    if refused:
        with pytest.raises(UserError, match="cannot be"):
            tokenizer_json(file)
        return
    own, written = load(file)
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices([*MARKS, "the", " ", "   ", "a", "aa", "qu", "ick", "x", "2"], k=rng.randint(0, 9)))
        assert written.encode(text, add_special_tokens=False).ids == own.EncodeAsIds(text), text


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        tokenizer_json(tmp_path / "tokenizer.model")
