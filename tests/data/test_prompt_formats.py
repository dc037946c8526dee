"""The original's conversation format, written out by hand."""

from __future__ import annotations

from sphinx_pl.data.prompt_formats import SPHINX, SYSTEM, is_document
from sphinx_pl.data.schema import Turn

TWO = (Turn("What is it?", "A cat."), Turn("Its colour?", "B"))


def answers(rendered) -> list[str]:  # type: ignore[no-untyped-def]
    return [rendered.text[begin:end] for begin, end in rendered.answers]


def test_one_turn_with_the_originals_system_text() -> None:
    rendered = SPHINX.render([Turn("What's in the image?", "A dog.")], SYSTEM)
    assert rendered.text == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.\n\n### Human: What's in the image?\n### Assistant: "
        "A dog.\n###"
    )
    assert answers(rendered) == [" A dog.\n###"]


def test_several_turns_go_on_after_the_separator() -> None:
    rendered = SPHINX.render(TWO, "Be brief.")
    assert rendered.text == (
        "Be brief.\n\n### Human: What is it?\n### Assistant: A cat.\n### Human: Its colour?\n### Assistant: B\n###"
    )
    assert answers(rendered) == [" A cat.\n###", " B\n###"]


def test_without_a_system_text_there_is_the_separator_alone() -> None:
    assert SPHINX.render(TWO[:1], "").text == "### Human: What is it?\n### Assistant: A cat.\n###"


def test_an_answer_that_occurs_in_its_question_is_supervised_where_it_is_the_answer() -> None:
    # The original looks for the first match, which is in the question.
    rendered = SPHINX.render([Turn("A or\n###B\n### or B", "B")], "")
    [(begin, end)] = rendered.answers
    assert rendered.text[:begin].endswith("### Assistant:")
    assert rendered.text[begin:end] == " B\n###"
    assert end == len(rendered.text)


def test_open_ended_stops_where_the_model_is_to_answer() -> None:
    rendered = SPHINX.render(TWO, "", open_ended=True)
    assert rendered.text == "### Human: What is it?\n### Assistant: A cat.\n### Human: Its colour?\n### Assistant:"
    assert answers(rendered) == [" A cat.\n###"]
    assert SPHINX.render(TWO, "").text.startswith(rendered.text)


def test_a_document_is_its_text_alone() -> None:
    document = [Turn("", "Once upon a time.")]
    assert is_document(document)
    assert SPHINX.render(document, SYSTEM).text == "Once upon a time."
    assert SPHINX.render(document, SYSTEM).answers == ((0, 17),)
    assert SPHINX.render(document, SYSTEM, open_ended=True).text == ""


def test_an_empty_question_among_others_is_a_turn_all_the_same() -> None:
    turns = [Turn("", "A."), Turn("Why?", "So.")]
    assert not is_document(turns)
    assert SPHINX.render(turns, "").text == "### Human: \n### Assistant: A.\n### Human: Why?\n### Assistant: So.\n###"
