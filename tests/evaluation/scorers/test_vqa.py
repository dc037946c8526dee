"""Against LAVIS' copy of vqaEval.py and lmms-eval's of MMF's evaluator; where those differ from us, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sphinx_pl.evaluation.scorers.vqa import normalise_textvqa, normalise_vqa, textvqa_accuracy, vqa_accuracy

Golden = dict[str, list[Any]]


def test_normalised_answers_are_those_of_lavis_and_of_lmms_eval(golden: Golden) -> None:
    assert len(golden["words"]) > 2500
    for text, lavis, lmms in golden["words"]:
        assert normalise_vqa(text) == lavis, text
        assert normalise_textvqa(text) == lmms, text


def test_textvqa_accuracy_is_that_of_lmms_eval(golden: Golden) -> None:
    scores = [(textvqa_accuracy(case[0], case[1]), case[4]) for case in golden["vqa"]]
    assert all(ours == pytest.approx(theirs) for ours, theirs in scores)
    assert {round(theirs, 1) for _, theirs in scores} == {0.0, 0.3, 0.6, 0.9, 1.0}  # every value of ten answers


def as_one(answers: list[str]) -> bool:
    return len({answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers}) == 1


def test_vqa_accuracy_is_that_of_lmms_eval_where_answers_differ(golden: Golden) -> None:
    """Where all are the same, lmms-eval normalises and vqaEval.py does not: the next test but one."""
    cases = [case for case in golden["vqa"] if not as_one(case[1])]
    assert len(cases) > 1000
    for prediction, answers, _, lmms, _ in cases:
        assert vqa_accuracy(prediction, answers) == pytest.approx(lmms), (prediction, answers)


def test_vqa_accuracy_is_that_of_lavis_where_normalised_answers_are_the_whole_difference(golden: Golden) -> None:
    """LAVIS has an older vqaEval.py: it normalises the prediction always, and of answers only the punctuation. So it
    agrees where answers without their punctuation are normalised, and where all are the same and the prediction is."""
    agreeing = 0
    for prediction, answers, lavis, _, _ in golden["vqa"]:
        plain = [normalise_vqa(answer) for answer in answers]
        if as_one(answers):
            comparable = normalise_vqa(prediction) == prediction.strip() and answers[0] == answers[0].strip()
        else:
            comparable = plain == answers
        if comparable:
            agreeing += 1
            assert vqa_accuracy(prediction, answers) == pytest.approx(lavis), (prediction, answers)
    assert agreeing > 50


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # worked by hand: all answers the same, so nothing is normalised but white space around
        ("yes", ["yes"] * 10, 1),
        (" yes\n", ["yes"] * 10, 1),
        ("Yes", ["yes"] * 10, 0),
        ("yes.", ["yes"] * 10, 0),
        ("the dog", ["the dog"] * 10, 1),
        ("dog", ["the dog"] * 10, 0),
        # worked by hand: one differs, so all is normalised
        ("Yes.", ["yes"] * 9 + ["no"], 1),
        ("dog", ["The dog."] * 9 + ["cat"], 1),
        ("two", ["2"] * 9 + ["3"], 1),
        ("none", ["0"] * 9 + ["1"], 1),
        ("dont know", ["don't know"] * 9 + ["no"], 1),
        ("", ["yes"] * 9 + ["no"], 0),
        # worked by hand: of 4 who agree, leaving one of them out leaves 3 (4 x 1), leaving another leaves 4 (6 x 1)
        ("red", ["red"] * 4 + ["blue"] * 6, 1),
        # 3 agree: (3 x 2/3 + 7 x 1) / 10; 2: (2 x 1/3 + 8 x 2/3) / 10; 1: (1 x 0 + 9 x 1/3) / 10
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("red", ["red"] * 1 + ["blue"] * 9, 0.3),
        # VizWiz: "unanswerable" is an answer like others
        ("unanswerable", ["unanswerable"] * 7 + ["a cup", "mug", "cup"], 1),
        ("cup", ["unanswerable"] * 7 + ["a cup", "mug", "cup"], 0.6),
        ("", ["unanswerable"] * 7 + ["a cup", "mug", "cup"], 0),
    ],
)
def test_vqa_accuracy(prediction: str, answers: list[str], expected: float) -> None:
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # worked by hand: five answers have four others, as with ten; 4 of 5 agree: (4 x 1 + 1 x 1) / 5
        ("red", ["red"] * 4 + ["blue"], 1),
        ("red", ["red"] * 2 + ["blue"] * 3, (2 * 1 / 3 + 3 * 2 / 3) / 5),
        # three answers: two others, so two are asked for instead of three
        ("red", ["red"] * 3, 1),
        ("red", ["red", "red", "blue"], (2 * 1 / 2 + 1 * 1) / 3),
        ("red", ["red", "blue"], (0 + 1) / 2),
        ("red", ["red"], 1),
        ("Red", ["red"], 0),
    ],
)
def test_fewer_than_ten_answers(prediction: str, answers: list[str], expected: float) -> None:
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "vqa", "textvqa"),
    [
        # worked by hand
        ("1,000", "1000", "1000"),
        ("1,000 (approx)", "1000 approx", "1000 approx"),
        ("red,blue", "red blue", "redblue"),  # no blank beside the comma; TextVQA has dropped it before
        ("red, blue", "red blue", "red blue"),
        ("john's", "john's", "john 's"),
        ("ten a.m.", "10 am", "10 am"),
        ("3.50", "3.50", "3.50"),
        ("5.", "5", "5"),
        ("A the an", "", ""),
        ("Im", "im", "im"),  # the table has "Im" with a capital only, and words are small by then
        ("dont", "don't", "don't"),
        ("what?", "what", "what"),
        ("7:30", "7:30", "7:30"),
        ("\tone\ntwo", "1 2", "1 2"),
    ],
)
def test_normalised(text: str, vqa: str, textvqa: str) -> None:
    assert (normalise_vqa(text), normalise_textvqa(text)) == (vqa, textvqa)


def test_a_full_stop_stays_after_the_thirty_second() -> None:
    # worked by hand: the script's count of replacements is re.UNICODE, 32
    assert normalise_vqa("." * 40) == "." * 8


def test_textvqa_normalises_equal_answers_too() -> None:
    assert textvqa_accuracy("Yes.", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0


@pytest.mark.parametrize("accuracy", [vqa_accuracy, textvqa_accuracy])
def test_no_answers_are_refused(accuracy: Any) -> None:
    with pytest.raises(ValueError, match="at least one answer"):
        accuracy("yes", [])
