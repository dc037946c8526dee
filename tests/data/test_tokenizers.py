"""Ids, and the characters that each of them stands for."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphinx_pl.data.processor import Processor
from sphinx_pl.data.tokenizers import Tokenizer, load_tokenizer
from sphinx_pl.utils.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(sample_data: Path) -> Tokenizer:
    return load_tokenizer(sample_data / "tokenizer.model")


def test_special_ids_and_size_are_llamas(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 512)
    assert tokenizer.encode("") == []
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode("a circle"))


def test_the_dummy_prefix_stays(tokenizer: Tokenizer) -> None:
    # A word at a start and the same word after a space are the same ids.
    assert tokenizer.encode("red") == tokenizer.encode("a red")[len(tokenizer.encode("a")) :]


def test_spans_of_words_and_digits(tokenizer: Tokenizer) -> None:
    text = "two 42\n###"
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text)
    assert spans[-3:] == [(4, 5), (5, 6), (6, 10)]  # digits stand alone, the separator is one piece


def test_every_byte_of_a_character_stands_for_that_character(tokenizer: Tokenizer) -> None:
    ids, spans = tokenizer.encode_with_spans("é 日😀")
    assert spans[-7:] == [(2, 3)] * 3 + [(3, 4)] * 4
    assert tokenizer.decode(ids[-7:-4]) == "日"
    assert tokenizer.decode(ids[-4:]) == "😀"


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\0▁"), min_size=1))
@settings(deadline=None, max_examples=150)
def test_spans_are_in_order_cover_the_text_and_decode_to_it(tokenizer: Tokenizer, text: str) -> None:
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= begin < end <= len(text) for begin, end in spans)
    assert all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(spans))
    assert {i for begin, end in spans for i in range(begin, end)} == set(range(len(text)))


def test_decoding_ignores_what_is_no_piece(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a red circle")
    assert tokenizer.decode([-1, *ids, tokenizer.vocab_size + 7]) == "a red circle"


def test_it_travels_to_a_data_worker(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a red 7") == tokenizer.encode("a red 7")


def test_a_missing_or_wrong_file_is_answered_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file at .*nowhere\.model"):
        load_tokenizer(tmp_path / "nowhere.model")
    wrong = tmp_path / "wrong.model"
    wrong.write_bytes(b"{}" * 40)
    with pytest.raises(UserError, match=r"wrong\.model is not a sentencepiece model"):
        load_tokenizer(wrong)


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(sample_data: Path, model_config) -> None:  # type: ignore[no-untyped-def]
    model_config.decoder.vocab_size = 500
    with pytest.raises(UserError, match=r"512 pieces .* 500"):
        Processor.from_dict({}, sample_data / "tokenizer.model", model_config)
