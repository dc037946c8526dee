"""Against lmms-eval's MMBench, SEED-Bench and ScienceQA on answers that each can read; the rest by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sphinx_pl.data.answer_parsing import normalise, read_letter
from sphinx_pl.evaluation.scorers.choices import circular, mmbench_question, score_choice
from tests.evaluation.official import mean_by, scienceqa_summary

Golden = dict[str, list[Any]]
LETTER = re.compile(r"\(?([A-E])(?:[).:]*|[).:]+ (.+))", re.DOTALL)


def tell_apart(options: list[str]) -> bool:
    """No option's text looks like a letter."""
    return not {"A", "B", "I. Newton", "C. Darwin"} & set(options)


def plain(text: str, options: list[str]) -> bool:
    """A letter of an option, alone or with that option's own text."""
    match = LETTER.fullmatch(text)
    if not match or not tell_apart(options) or (index := "ABCDE".index(match[1])) >= len(options):
        return False
    return match[2] is None or normalise(match[2]) == normalise(options[index])


def test_plain_letters_are_those_that_mmbench_reads(golden: Golden) -> None:
    cases = [case for case in golden["mmbench"] if plain(case[0], case[1])]
    assert len(cases) > 50
    for text, options, letter in cases:
        assert read_letter(text, options, stated=True) == letter, (text, options)


def test_an_options_text_alone_is_the_option_that_mmbench_reads(golden: Golden) -> None:
    """MMBench takes the only option whose text is anywhere in the answer; we take it if it is all of the answer."""
    agreeing = 0
    for text, options, letter in golden["mmbench"]:
        held = [option for option in options if option.lower() in text.lower()]
        if tell_apart(options) and len(held) == 1 and normalise(text) == normalise(held[0]) and text[:2] != "a ":
            agreeing += 1
            assert read_letter(text, options, stated=True) == letter, (text, options)
    assert agreeing > 20


def test_no_option_is_read_where_mmbench_reads_another(golden: Golden) -> None:
    """But where options look like letters, or the text's letter is small or bold, which MMBench does not read as one,
    or where it takes an option's text that is only a part of the answer."""
    agreeing = 0
    for text, options, letter in golden["mmbench"]:
        ours = read_letter(text, options, stated=True)
        if ours and letter and tell_apart(options) and not re.search(r"\b[ab]\b|\*", text):
            agreeing += 1
            assert ours == letter, (text, options)
    assert agreeing > 150


def test_letters_are_those_of_seed_bench_on_its_form(golden: Golden) -> None:
    """SEED-Bench takes the first character, so any text that begins with a letter's character would do."""
    cases = [case for case in golden["seedbench"] if plain(case[0], case[1]) and not case[0].startswith("(")]
    assert len(cases) > 20
    for text, options, answer, right in cases:
        assert score_choice(text, options, answer).value == right, (text, options)


def test_letters_are_those_of_scienceqa_on_its_form(golden: Golden) -> None:
    """It reads a letter alone, in any case, and "B. ..." whatever follows: also another option's text."""
    count = 0
    for text, options, index, right in golden["scienceqa"]:
        alone = re.fullmatch(r"[A-Ea-e]", text) is not None and "ABCDE".index(text.upper()) < len(options)
        if tell_apart(options) and (alone or (plain(text, options) and re.match(r"[A-E](?:\.|$)", text))):
            count += 1
            assert score_choice(text, options, "ABCDE"[index]).value == right, (text, options)
        elif tell_apart(options) and right:
            assert read_letter(text, options, stated=True) is None
            assert normalise(text[2:]) in map(normalise, options)
    assert count > 30


CAT = ["a cat", "dog", "red", "blue"]


READ = [
    # worked by hand
    ("B", "B"),
    (" b\n", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("B: dog", "B"),
    ("B. Dog.", "B"),
    ("B. anything", "B"),
    ("**B**", "B"),
    ('"B"', "B"),
    ("Answer: B", "B"),
    ("Answer: (b)", "B"),
    ("The answer is B", "B"),
    ("The correct answer is (B).", "B"),
    ("The answer is option B.", "B"),
    ("The answer is B because it barks", "B"),
    ("Option B", "B"),
    ("Option B is correct", "B"),
    ("B is the right one", "B"),
    ("Option A is wrong. The correct option is B.", "B"),
    ("B\nIt barks.", "B"),
    ("[B]", "B"),
    ("B!", "B"),
    ("B - dog", "B"),
    ("B dog", "B"),
    ("B。", "B"),
    ("B、dog", "B"),
    ("A\nB", None),
    ("A dog and a cat", None),
    ("B is not correct", None),
    ("A is wrong, B is correct", None),
    ("It barks. The answer is B.", "B"),
    ("dog", "B"),
    ("A cat.", "A"),
    ("The answer is a cat.", "A"),
    ("Answer: RED", "C"),
    # nothing is guessed
    ("", None),
    ("E", None),
    ("Blueish", None),
    ("bad", None),
    ("A dog", None),
    ("The answer is A dog", None),
    ("A or B", None),
    ("A, B", None),
    ("A. B.", None),
    ("B. red", None),  # the letter of one option, the text of another
    ("It is not B", None),
    ("The answer is not B", None),
    ("The answer is A or B", None),
    ("The answer is A. The answer is B.", None),
    ("I see a dog", None),
    ("dog or red", None),
    ("Image B", None),
    ("1", None),
]


def test_read_choice(subtests: pytest.Subtests) -> None:
    for text, letter in READ:
        with subtests.test(text=text):
            assert read_letter(text, CAT, stated=True) == letter


ANIMALS = ["cat", "dog", "bird", "fish"]


SEVERAL = [
    # the options again, in whatever form
    "A. cat\nB. dog\nC. bird\nD. fish",
    "A. cat B. dog C. bird D. fish",
    "A) cat, B) dog, C) bird, D) fish",
    "(A) cat (B) dog",
    "- A. cat\n- B. dog",
    "A - cat\nB - dog",
    "a. cat b. dog",
    "A: cat; B: dog",
    "A\ncat\nB\ndog",
    "A.cat B.dog",
    "cat, dog, bird, fish",
    "**A. cat**\n**B. dog**",
    "Ａ．cat\nＢ．dog",
    # several
    "C. bird or D. fish",
    "C. a bird or D. a fish",
    "B. or C.",
    "(a) and (b)",
    "A and B",
    "A. cat and B. dog",
    "A/B",
    "A, B, C and D",
    "A. cat 或 B. dog",
    "Option A, Option B",
    "Option A or option B",
    "Answer: A. cat B. dog",
    "The answer is (A) or (B).",
    "A is correct. B is correct.",
    "B. No, C.",
    "A. cat, dog",
    "A. a cat; a fish",
    # a letter that is taken back
    "A. not a cat",
    "A) is not right",
    "A: wrong",
    "A. No.",
    "The answer is A. Not cat",
    # none
    "None of the above",
    "not B",
    "the answer is not A but C",
    "A. dog",
    "1",
]


def test_a_text_that_names_several_names_none(subtests: pytest.Subtests) -> None:
    for text in SEVERAL:
        with subtests.test(text=text):
            assert read_letter(text, ANIMALS, stated=True) is None


ALIKE = [
    ("B. It is not A.", ANIMALS, "B"),
    ("B. Because A is too small.", ANIMALS, "B"),
    ("A. a cat", ANIMALS, "A"),
    ("Ｂ", ANIMALS, "B"),
    ("（Ｂ）", ANIMALS, "B"),
    # an option's text may hold another's, or look like something else
    ("hot dog", ["dog", "hot dog"], "B"),
    ("B. hot dog", ["dog", "hot dog"], "B"),
    ("A. hot dog", ["dog", "hot dog"], None),
    ("10", ["1", "10"], "B"),
    ("A. 10", ["1", "10"], None),
    ("1.0", ["1", "1.0"], "B"),
    ("None", ["Yes", "No", "None"], "C"),
    ("C. A and C", ["vitamin A", "vitamin C", "A and C"], "C"),
    ("A and C", ["vitamin A", "vitamin C", "A and C"], "C"),
    ("A. Paris, B. France", ["Paris, B. France", "x"], "A"),
    ("cafe\u0301", ["caf\u00e9", "tea"], "A"),
    (".", ["...", "x"], None),  # nothing is left of the option's text
    # options of the same text
    ("A. Dog", ["Dog", "dog."], "A"),
    ("B dog", ["Dog", "dog."], "B"),
    ("dog", ["Dog", "dog."], None),
    ("A. B", ["B", "A"], "A"),
    ("B. B", ["B", "A"], None),
    ("A", ["B", "A"], "A"),
]


def test_letters_and_texts_that_hold_one_another(subtests: pytest.Subtests) -> None:
    for text, options, letter in ALIKE:
        with subtests.test(text=text, options=options):
            assert read_letter(text, options, stated=True) == letter


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        # worked by hand
        ("A", ["B", "A"], "A"),  # a letter alone is a letter
        ("B. A", ["B", "A"], "B"),  # with its text
        ("dog", ["dog", "Dog."], None),  # both are that text
        ("C. Darwin", ["I. Newton", "C. Darwin"], "B"),  # there is no option C
        ("C. Darwin", ["I. Newton", "C. Darwin", "none"], "B"),  # there is, but its text is another
        ("C. Darwin", ["I. Newton", "C. Darwin", "Darwin"], None),  # its text fits as well
        ("D", ["x", "y"], None),
        ("", ["", "x"], None),  # an empty answer names nothing
        ("A", ["", "x"], "A"),
    ],
)
def test_options_that_look_like_letters(text: str, options: list[str], letter: str | None) -> None:
    assert read_letter(text, options, stated=True) == letter


def test_an_options_own_denial_is_no_denial() -> None:
    options = ["No", "not enough information", "cat, dog", "dog"]
    for letter, option in zip("ABCD", options, strict=True):
        for text in (f"{letter}. {option}", f"{letter}. {option}, as it seems"):
            assert read_letter(text, options, stated=True) == read_letter(text, options) == letter


def test_an_unread_answer_is_wrong_whatever_is_right() -> None:
    assert not any(score_choice("I do not know", CAT, letter).value for letter in "ABCD")


def test_circular_evaluation_is_that_of_mmbench(golden: Golden) -> None:
    hits = 0
    for rows, theirs in golden["circular"]:
        ours = circular((mmbench_question(index), choice == answer) for index, choice, answer in rows)
        assert ours == {question: bool(hit) for question, hit in theirs}
        hits += sum(ours.values())
    assert hits > 50


def test_circular_evaluation_misses_no_rotation() -> None:
    results = [("q1", True), ("q1", True), ("q2", True), ("q3", False), ("q3", True)]
    assert circular(results) == {"q1": True, "q2": True, "q3": False}  # worked by hand
    rotations = {"q1": 2, "q2": 3, "q3": 2, "q4": 4}
    assert circular(results, rotations) == {"q1": True, "q2": False, "q3": False, "q4": False}


def test_scienceqa_summary() -> None:
    results = [
        (True, "natural science", True, True, 6),
        (False, "natural science", False, False, 7),
        (True, "social science", False, True, 1),
        (False, "language science", True, False, 12),
    ]
    assert scienceqa_summary(results) == {  # worked by hand
        "average": 2 / 4,
        "NAT": 1 / 2,
        "SOC": 1,
        "LAN": 0,
        "TXT": 1 / 2,
        "IMG": 2 / 2,
        "NO": 0,
        "G1-6": 2 / 2,
        "G7-12": 0,
    }


def test_mean_by() -> None:
    assert mean_by([("a", 1), ("b", 0), ("a", 0)]) == {"a": 0.5, "b": 0}  # worked by hand
    assert mean_by([]) == {}
