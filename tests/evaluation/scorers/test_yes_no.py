"""POPE against scikit-learn and lmms-eval, MME against lmms-eval; how answers are read, by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from sphinx_pl.data.answer_parsing import TRUE_FALSE, read_yes_or_no
from sphinx_pl.evaluation.benchmarks.mme import COGNITION, PERCEPTION
from sphinx_pl.evaluation.scorers.base import Score
from sphinx_pl.evaluation.scorers.yes_no import score_yes_no
from tests.evaluation.official import mme_scores, pope_scores

Golden = dict[str, list[Any]]
WORDS = {True: "yes", False: "no", None: "other"}


def test_pope_scores_are_those_of_scikit_learn() -> None:
    """An answer that says neither is there the label that is not the true one, but for precision, which it lowers."""
    rng = random.Random(0)
    for _ in range(120):
        labels = rng.choices((True, False), (rng.random() + 0.01, rng.random() + 0.01), k=rng.randint(1, 80))
        answers = [rng.choice((label, True, False)) for label in labels]
        scores = pope_scores(answers, labels)
        precision, recall, f1, _ = precision_recall_fscore_support(labels, answers, average="binary", zero_division=0)
        theirs = [accuracy_score(labels, answers), precision, recall, f1]
        assert [scores.accuracy, scores.precision, scores.recall, scores.f1] == pytest.approx(theirs)
        assert (scores.yes_ratio, scores.unparsed) == (pytest.approx(sum(answers) / len(answers)), 0)

        some = [None if rng.random() < 0.3 else answer for answer in answers]
        wrong = [not label if answer is None else answer for answer, label in zip(some, labels, strict=True)]
        scores = pope_scores(some, labels)
        _, recall, _, _ = precision_recall_fscore_support(labels, wrong, average="binary", zero_division=0)
        assert [scores.accuracy, scores.recall] == pytest.approx([accuracy_score(labels, wrong), recall])


def test_pope_scores_are_those_of_lmms_eval(golden: Golden) -> None:
    """Two of its figures are others: its share of yes is of the labels, and its recall leaves out what says neither."""
    all_read = 0
    for predictions, labels, accuracy, precision, recall, f1, yes_ratio in golden["pope"]:
        answers = [{"yes": True, "no": False}.get(prediction.lower().strip()) for prediction in predictions]
        truth = [label == "yes" for label in labels]
        scores = pope_scores(answers, truth)
        assert [scores.accuracy, scores.precision] == pytest.approx([accuracy, precision])
        assert sum(truth) / len(truth) == pytest.approx(yes_ratio)
        if None not in answers:
            all_read += 1
            assert [scores.recall, scores.f1] == pytest.approx([recall, f1])
    assert all_read > 50


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # worked by hand
        ("yes or no", None),
        ("Yes/No", None),
        ("Yes and no.", None),
        ("yes, no", None),
        ("no, yes", None),
        ("Yes\nNo", None),
        ("Yes (no)", None),
        ('"yes" or "no"', None),
        ("Yes or no, depending on the light", None),
        ("Yes, no dog is here", True),
        ("No, there are cats and no dogs", False),
        ("No. No.", False),
        ("Yes. No", None),
        ("No! Yes!", None),
        ("Yes. It is red. No, wait.", None),
        ("Yes. No dog is there. No one sees it.", True),
        ("Yes... There is, no doubt", True),
        ("Yes. There is no dog.", True),
    ],
)
def test_who_says_both_says_neither(text: str, answer: bool | None) -> None:
    assert read_yes_or_no(text) is answer
    assert read_yes_or_no(text, words=TRUE_FALSE) is answer


def test_pope_scores() -> None:
    # worked by hand: 2 of 3 true yes are found, with 1 false one; 1 answer of 6 says neither
    scores = pope_scores([True, True, None, True, False, False], [True, True, True, False, False, False])
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.precision == pytest.approx(2 / 3)
    assert scores.recall == pytest.approx(2 / 3)
    assert scores.f1 == pytest.approx(2 / 3)
    assert scores.yes_ratio == pytest.approx(3 / 6)
    assert scores.unparsed == pytest.approx(1 / 6)
    assert pope_scores([False], [False]).f1 == 0  # nothing to find: 0, as a ratio of nothing
    for answers, labels in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match=r"no answers|argument"):
            pope_scores(answers, labels)


@pytest.mark.parametrize(
    ("text", "strict", "pope", "mme"),
    [
        # worked by hand: without leniency, POPE's and MME's
        ("Yes", True, True, True),
        ("no", False, False, False),
        ("Yes, there is a dog.", True, True, True),
        ("No, there is not.", False, False, False),
        ("yes. No.", None, True, True),  # lmms-eval's exact match reads neither
        ("There is no dog", None, False, None),
        ("There is not", None, False, None),
        ("NO", False, True, False),  # POPE knows "No" and "no"
        ("No!", False, True, False),
        ("No\n", False, True, False),  # and parts words at blanks only
        ("", None, True, None),
        ("I cannot tell", None, True, None),
        ("none", None, True, False),
        ("Nothing", None, True, False),
        ("yesterday", None, True, True),
        ("A dog, yes", None, True, None),
        ("no-one", None, True, False),
        ("  'Yes'", True, True, True),
        (".no", False, True, False),  # the first sentence is empty
        ("y", None, True, None),
    ],
)
def test_how_answers_are_read(text: str, strict: bool | None, pope: bool, mme: bool | None) -> None:
    readings = tuple(read_yes_or_no(text, official) for official in ("", "pope", "mme"))
    assert readings == (strict, pope, mme)
    for official, reading in zip(("", "pope", "mme"), readings, strict=True):
        for truth in (True, False):
            expected = Score(float(reading is truth), reading is not None)
            assert score_yes_no(text, truth, official) == expected


def test_mme_reads_as_lmms_eval_does(golden: Golden) -> None:
    """That reads "y" and "n" too, and drops full stops before it looks at four letters, so also reads "I. No"."""
    differing = [text for text, theirs in golden["mme_words"] if WORDS[read_yes_or_no(text, "mme")] != theirs]
    assert len(golden["mme_words"]) == 480
    assert all(text.strip().rstrip(".") in ("y", "n") or "." in text.strip()[:4] for text in differing)
    assert 0 < len(differing) < 50


def test_mme_scores_are_those_of_lmms_eval(golden: Golden) -> None:
    for answers, kind, total in golden["mme"]:
        scores = mme_scores((subtask, image, bool(right)) for subtask, image, right in answers)
        assert getattr(scores, kind) == pytest.approx(total)
        assert min(scores.perception, scores.cognition) == 0
        assert sum(map(scores.points, scores.accuracy)) == pytest.approx(total)


def test_mme_scores() -> None:
    results = [("OCR", "1", True), ("OCR", "1", True), ("OCR", "2", True), ("OCR", "2", False)]
    results += [("code_reasoning", "1", False), ("code_reasoning", "1", True)]
    scores = mme_scores(results)  # worked by hand
    assert scores.accuracy == {"OCR": 3 / 4, "code_reasoning": 1 / 2}
    assert scores.accuracy_plus == {"OCR": 1 / 2, "code_reasoning": 0}
    assert (scores.perception, scores.cognition) == (125, 50)
    every = mme_scores((task, "1", True) for task in PERCEPTION + COGNITION for _ in range(2))
    assert (every.perception, every.cognition) == (2000, 800)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([("ocr", "1", True)] * 2, "no subtask 'ocr'"),
        ([("OCR", "1", True)], "OCR/1 has 1"),
        ([("OCR", "1", True)] * 3, "OCR/1 has 3"),
    ],
)
def test_what_is_not_mme_is_refused(results: list[tuple[str, str, bool]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mme_scores(results)
