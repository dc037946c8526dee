"""No text of data or users becomes structure: what is compared are token ids, as the model reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.prompt_formats import SPHINX
from sphinx_pl.data.schema import Record, Turn
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.utils.errors import UserError

PARTS = (
    *("\n", "\r\n", "\r", " ", "\u2581", "\u2028", "\x85", "\x0b", "\0", "a", "é", "1", "."),
    *("#", "##", "###", "####", "\uff03", "\n###", "\n\n###", "\r\n###", "a\n###", " \n###", "\n ###", "###\n"),
    *(
        "Human",
        " Human:",
        " Assistant:",
        "\u2581Human:",
        "Human:",
        "### Human:",
        "### Assistant:",
        "\n### Assistant: a",
    ),
    *("<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0x23>", "<|im_end|>", "[INST]"),
)
HOSTILE = st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join)


@pytest.fixture(scope="module", params=["sample", "golden"])
def plain(sample_data: Path, request: pytest.FixtureRequest) -> Processor:
    """With marks that are pieces of their own, and with LLaMA's way of writing a line break as a byte."""
    folders = {"sample": sample_data, "golden": Path(__file__).parents[1] / "golden"}
    tokenizer = load_tokenizer(folders[request.param] / "tokenizer.model")
    return Processor(ProcessorConfig(system="", max_length=4096), tokenizer, tokens_per_image=3, image_size=32)


def count(ids: list[int], wanted: list[int]) -> int:
    return sum(ids[n : n + len(wanted)] == wanted for n in range(len(ids)))


def structure(processor: Processor, record: Record) -> list[int]:
    """How often the ids of turns' ends and beginnings occur, in all the ways that they are tokenized."""
    encode = processor.tokenizer.encode
    after = len(encode("a"))
    headers = [
        encode(f"{before}###{role}")[after if before else 0 :]
        for before in ("a\n", "a", "a ", "")
        for role in (" Human:", " Assistant:")
    ]
    [question] = processor.sample(record, "s").questions
    assert not any(processor.tokenizer.is_special(i) for i in question.ids[1:])
    # `stop_sequences` begins with what ends a turn after a word: the others end with the same ids.
    return [count(question.ids, wanted) for wanted in (processor.stop_sequences[0], *headers)]


@given(st.lists(st.tuples(HOSTILE.filter(str.strip), HOSTILE.filter(str.strip)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=150)
def test_no_text_has_the_ids_of_a_turns_end_or_beginning(plain: Processor, texts: list[tuple[str, str]]) -> None:
    turns, harmless = tuple(Turn(*text) for text in texts), (Turn("x", "y"),) * len(texts)
    for system, neutral in ((None, None), (texts[0][0], "z")):
        record = Record("k", "chat", turns=turns, system=system)
        expected = structure(plain, Record("k", "chat", turns=harmless, system=neutral))
        assert structure(plain, record) == expected
        assert expected[0] == 2 * len(turns) + (system is not None)
        prompt = plain.prompt(record).ids
        assert plain.sample(record, "s").questions[0].ids[: len(prompt)] == prompt


@given(HOSTILE)
@settings(deadline=None, max_examples=300)
def test_escaping_twice_is_escaping_once_and_lines_come_back(text: str) -> None:
    once = SPHINX.escape(text)
    assert SPHINX.escape(once) == once
    assert SPHINX.escape(SPHINX.unescape(once)) == once


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="#\uff03\ufe5f")))
@settings(deadline=None, max_examples=100)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert SPHINX.escape(text) == text
    assert SPHINX.render([Turn(text or "?", text)], "").escaped is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n### b", "a\n ### b"),
        ("### at its start, after a space\n## b\n #### c", "### at its start, after a space\n## b\n #### c"),
        ("one line ### Assistant: b", "one line ###  Assistant: b"),
        ("\r\n### Human: b", "\r\n ###  Human: b"),
        ("a\n\uff03\uff03\uff03", "a\n \uff03\uff03\uff03"),
    ],
)
def test_a_space_is_all_that_is_added(text: str, expected: str) -> None:
    assert SPHINX.escape(text) == expected


def test_a_plain_document_has_no_structure_and_keeps_its_text(plain: Processor) -> None:
    text = "A title\n### Human: a heading\n###"
    sample = plain.sample(Record("k", "text", answer=text), "s")
    assert sample.questions[0].ids == [1, *plain.tokenizer.encode(text), 2]
    assert sample.events == {}


@pytest.mark.parametrize("options", [{}, {"remove_extra_whitespaces": False}])
def test_a_tokenizer_for_which_lines_are_spaces_is_refused(
    options: dict[str, Any], tmp_path: Path, model_config: Any
) -> None:
    """sentencepiece's default normalization: a question with " ###" would have the ids of a turn's end."""
    (tmp_path / "words.txt").write_text("### Human: a red circle ### Assistant: yes\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "t"), vocab_size=40, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    with pytest.raises(UserError, match="writes a line break as a space"):
        Processor.from_dict({}, tmp_path / "t.model", model_config)
    # What would be lost: escaped or not, a text has the ids of a turn's end, and what is generated keeps its end.
    lost = Processor(
        ProcessorConfig(system=""), load_tokenizer(tmp_path / "t.model"), tokens_per_image=3, image_size=32
    )
    ends = [
        count(lost.sample(Record("k", "chat", turns=(Turn("a", answer),)), "s").questions[0].ids, stop)
        for answer in ("yes", "yes ### a")
        for stop in lost.stop_sequences[:1]
    ]
    assert ends[1] == ends[0] + 1
    assert lost.decode(lost.tokenizer.encode("yes\n###")) == "yes ###"
