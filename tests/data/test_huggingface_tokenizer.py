"""Hugging Face's tokenizers beside the library itself: ids, characters, and what is no text."""

from __future__ import annotations

import itertools
import json
import pickle
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from sphinx_pl.data.tokenizers import HuggingFaceTokenizer, copy_tokenizer, load_tokenizer
from tests.data.chat_templates import LLAMA3, QWEN2, Shipped, byte_level, metaspace

_END = ("<|im_start|>", "<|im_end|>")
_SPACED = [
    AddedToken(name, special=True, normalized=False, rstrip=True, lstrip=name == "<|a|>") for name in ("<|a|>", "<|b|>")
]
KINDS = {
    "gpt2": lambda: byte_level(_END),
    "llama3": lambda: byte_level(_END, LLAMA3),
    "qwen2": lambda: byte_level(_END, QWEN2, nfc=True),
    "llama2": lambda: metaspace(_END),
    "first": lambda: metaspace(_END, "first"),
    "always": lambda: metaspace(_END, "always"),
    "never": lambda: metaspace(_END, "never"),
    "spaced": lambda: metaspace(_SPACED, "first"),
}
ANY = st.text(alphabet=st.characters(exclude_categories=("Cs",)))
MARKS = (
    *_END,
    "<|a|>",
    "<|b|>",
    "</s>",
    "<s>",
    "<unk>",
    "<0x41>",
    " ",
    "  ",
    "\n",
    "\u2581",
    "e\u0301",
    "\U0001f468\u200d\U0001f469",
)
TEXTS = st.lists(st.one_of(ANY, st.sampled_from(MARKS)), max_size=8).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HuggingFaceTokenizer, Tokenizer]:
    """Ours, and the library's of the same file."""
    kind = KINDS[request.param]()
    end = "</s>" if kind.token_to_id("</s>") is not None else "<|im_end|>"
    folder = Shipped("", kind, {"eos_token": end, "unk_token": "<unk>"}).write(tmp_path_factory.mktemp("kind"))
    ours = load_tokenizer(folder)
    assert isinstance(ours, HuggingFaceTokenizer)
    return ours, Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(text=TEXTS)
@settings(deadline=None, max_examples=60)
def test_text_has_the_ids_and_characters_that_the_library_gives(
    both: tuple[HuggingFaceTokenizer, Tokenizer], text: str
) -> None:
    ours, library = both
    library.encode_special_tokens = True
    encoding = library.encode(text, add_special_tokens=False)
    ids, spans = ours.encode_with_spans(text)
    assert ids == encoding.ids == ours.encode(text)
    assert [span for span, (a, b) in zip(spans, encoding.offsets, strict=True) if a < b] == [
        (a, b) for a, b in encoding.offsets if a < b
    ]
    assert not {token.id for token in ours.controls.values()} & set(ids)
    assert all(0 <= begin < end <= len(text) for begin, end in spans)
    assert all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(spans))


@given(text=TEXTS)
@settings(deadline=None, max_examples=60)
def test_text_comes_back(both: tuple[HuggingFaceTokenizer, Tokenizer], text: str) -> None:
    ours, library = both
    expected = unicodedata.normalize("NFC", text) if '"NFC"' in library.to_str() else text
    ids = ours.encode(text)
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
    pieces = [ours.piece(id) for id in ids]
    content = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces).decode()
    if "\u2581" not in text:  # it stands for a space; of a leading space some kinds make none, others two
        assert ours.decode(ids).lstrip(" ") == expected.lstrip(" ") == content.lstrip(" ")


@given(pieces=st.lists(st.one_of(ANY, st.integers(0, 9)), max_size=8))
@settings(deadline=None, max_examples=60)
def test_structure_has_the_ids_that_the_library_gives_the_whole_string(
    both: tuple[HuggingFaceTokenizer, Tokenizer], pieces: list[str | int]
) -> None:
    ours, library = both
    names = sorted(ours.controls)
    text, structure = "", []
    for piece in pieces:
        part = piece if isinstance(piece, str) else names[piece % len(names)]
        if isinstance(piece, int):
            structure.append((len(text), len(text) + len(part)))
        text += part
    library.encode_special_tokens = False
    encoding = library.encode(text, add_special_tokens=False)
    ids, spans = ours.encode_with_spans(text, structure)
    assert ids == encoding.ids
    marks = {token.id for token in ours.controls.values()}
    assert [span for id, span in zip(ids, spans, strict=True) if id in marks] == structure
    # Without the ranges, all of it is text.
    assert not marks & set(ours.encode(text))


def test_a_name_in_the_models_own_vocabulary_is_no_control_token_either(tmp_path: Path) -> None:
    """A unigram model may take a control token's name for a piece."""
    vocabulary = [("<unk>", 0.0), ("</s>", -1.0), *((letter, -5.0) for letter in "</s>ab")]
    unigram = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    unigram.add_special_tokens(["<unk>", "</s>"])
    ours = load_tokenizer(Shipped("", unigram, {"eos_token": "</s>", "unk_token": "<unk>"}).write(tmp_path))
    ids, spans = ours.encode_with_spans("a</s>b</s>", [(6, 10)])
    assert ids.count(ours.eos_id) == 1
    assert ids[-1] == ours.eos_id
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 10)]


def test_new_control_tokens_come_last_and_are_in_the_files(tmp_path: Path) -> None:
    kind = byte_level(["<|endoftext|>"], LLAMA3)
    kind.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    folder = Shipped("{{ 1 }}", kind, {"eos_token": "<|endoftext|>"}).write(tmp_path / "a")
    plain = load_tokenizer(folder)
    assert plain.encode("<think>") == [plain.vocab_size - 1]  # not special: a part of the vocabulary
    ours = plain.with_controls(["<|im_end|>", "<think>", "<|endoftext|>"])
    assert ours.new_tokens == ["<|im_end|>"]
    assert ours.vocab_size == plain.vocab_size + 1
    assert ours.controls["<|im_end|>"].id == plain.vocab_size
    text = "a <|im_end|> b <think> c"
    assert not {token.id for token in ours.controls.values()} & set(ours.encode(text))
    assert ours.decode([*ours.encode(text), ours.controls["<|im_end|>"].id]) == text
    (tmp_path / "b").mkdir()
    copy_tokenizer(ours, tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert (again.vocab_size, again.new_tokens, again.chat_template) == (ours.vocab_size, (), "{{ 1 }}")
    assert again.controls.keys() == {"<|endoftext|>", "<|im_end|>"}
    assert again.with_controls(["<|im_end|>"]) is again
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.encode_with_spans(text, [(0, len(text))]) == ours.encode_with_spans(text, [(0, len(text))])
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "b" / "tokenizer.json")).token_to_id("<|im_end|>") is not None


def test_sentencepiece_gets_new_control_tokens_too(tmp_path: Path) -> None:
    plain = load_tokenizer(Path(__file__).parents[1] / "golden" / "tokenizer.model")
    ours = plain.with_controls(["<|im_end|>", "</s>"])
    assert (ours.new_tokens, ours.vocab_size) == (["<|im_end|>"], plain.vocab_size + 1)
    text = "a red</s> <|im_end|> circle"
    assert ours.encode(text) == plain.encode(text)
    ids, spans = ours.encode_with_spans(text, [(10, 20)])
    assert ids.count(plain.vocab_size) == 1
    assert spans[ids.index(plain.vocab_size)] == (10, 20)
    ours.write(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.files == ours.files
    assert again.encode_with_spans(text, [(10, 20)]) == (ids, spans)


def test_the_files_of_a_folder_travel_together(tmp_path: Path) -> None:
    folder = Shipped("{{ 2 }}", byte_level(_END), {"eos_token": "<|im_end|>"}).write(tmp_path / "a")
    (folder / "chat_template.jinja").write_text("{{ 3 }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [421, 420]}))
    (folder / "README.md").write_text("no part of it")
    (tmp_path / "b").mkdir()
    copy_tokenizer(folder / "tokenizer.json", tmp_path / "b")
    assert {file.name for file in (tmp_path / "b").iterdir()} == {
        file.name for file in folder.iterdir() if file.name != "README.md"
    }
    copied = load_tokenizer(tmp_path / "b")
    assert (copied.chat_template, copied.eos_ids) == ("{{ 3 }}", (421, 420))
