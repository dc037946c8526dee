"""Structure: data/testmini.json of https://github.com/lupantech/MathVista."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.data.schema import ImageRef
from sphinx_pl.evaluation.benchmarks.mathvista import MathVistaBenchmark

from .conftest import Ask, Say

Write = Callable[..., Path]


def problem(pid: str, **more: Any) -> dict[str, Any]:
    return {
        "question": "what is the total volume of the measuring cup?",
        "image": f"images/{pid}.jpg",
        "choices": None,
        "unit": "g",
        "precision": None,
        "answer": "1000",
        "question_type": "free_form",
        "answer_type": "integer",
        "pid": pid,
        "metadata": {"split": "testmini", "task": "visual question answering", "skills": ["arithmetic reasoning"]},
    } | more


CHOICES = ["135°", "140°", "145°", "150°"]
PROBLEMS = {
    "2": problem("2"),
    "3": problem(
        "3",
        question="∠BOC=",
        choices=CHOICES,
        unit=None,
        answer="145°",
        question_type="multi_choice",
        answer_type="text",
        metadata={"task": "geometry problem solving"},
    ),
    "1": problem("1", unit=None, precision=1.0, answer="1.2", answer_type="float"),
    "9": problem("9", unit=None, answer="[1, 2]", answer_type="list"),
}


@pytest.mark.parametrize(
    ("answers", "scores", "unparsed"),
    [
        ({"2": "1000", "3": "C", "1": "1.2", "9": "[1, 2]"}, [1, 1, 1, 1], 0),
        ({"2": "The answer is 1,000 g.", "3": "145°", "1": "1.23 m", "9": "It is [1,2]."}, [1, 1, 1, 1], 0),
        ({"2": "100", "3": "A", "1": "1.3", "9": "[2, 1]"}, [0, 0, 0, 0], 0),
        ({"2": "100 or 1000", "3": "C or D", "1": "one", "9": "1, 2"}, [0, 0, 0, 0], 4),
    ],
)
def test_answers_are_read_by_rules(
    ask: Ask, write: Write, answers: dict[str, str], scores: list[int], unparsed: int
) -> None:
    asked = ask(
        MathVistaBenchmark(write({"testmini.json": PROBLEMS})), lambda record: answers[record.meta["problem"]["pid"]]
    )
    by_pid = {prediction.record["meta"]["problem"]["pid"]: prediction.score for prediction in asked.predictions}
    assert [by_pid[pid] for pid in PROBLEMS] == scores
    assert asked.values["accuracy", ""] == sum(scores) / 4
    assert asked.values["accuracy", "geometry problem solving"] == scores[1]
    assert asked.result["unparsed"] == unparsed


def test_questions_have_their_unit_and_their_choices(ask: Ask, write: Write, question: Say) -> None:
    src = write({"testmini.json": PROBLEMS})
    records = {record.key: record for record in ask(MathVistaBenchmark(src), lambda record: "").questions.records}
    assert question(records["it/2"]) == (
        "what is the total volume of the measuring cup? (Unit: g)\nAnswer the question using a single word or phrase."
    )
    assert question(records["it/3"]).startswith("∠BOC=\nA. 135°\nB. 140°\n")
    assert records["it/3"].images == (ImageRef(str(src / "images/3.jpg")),)


def test_responses_for_the_official_judge(ask: Ask, write: Write, tmp_path: Path) -> None:
    benchmark = MathVistaBenchmark(write({"testmini.json": PROBLEMS}))
    asked = ask(benchmark, lambda record: "I think 7.")
    (sentence,) = benchmark.submit(asked.predictions, tmp_path)
    assert sentence.endswith(
        f"(python extract_answer.py --output_dir {tmp_path} --output_file answers_mathvista_testmini.json, then python "
        f"calculate_score.py --output_dir {tmp_path} --output_file answers_mathvista_testmini.json "
        "--score_file scores_mathvista_testmini.json; the first asks a language model)"
    )
    written = json.loads((tmp_path / "answers_mathvista_testmini.json").read_text())
    # The keys that extract_answer.py and calculate_score.py read.
    assert written["3"] == PROBLEMS["3"] | {"response": "I think 7.", "query": written["3"]["query"]}
    assert set(written) == set(PROBLEMS)


def test_odd_entries_are_counted(ask: Ask, write: Write) -> None:
    odd = {
        "a": problem("a", question_type="multi_choice", choices=CHOICES),
        "b": problem("b", question_type="multi_choice", choices=None),
        "c": problem("c", answer_type="poem"),
        "d": problem("d", answer=1000),
        "e": problem("e", question=""),
        "f": problem("f", precision="many"),
        "g": None,
        "h": {"pid": "h"},
    }
    asked = ask(MathVistaBenchmark(write({"testmini.json": PROBLEMS | odd})), lambda record: "")
    assert asked.result["lost"] == {"answer_not_in_choices": 1, "question_empty": 1, "entry_malformed": 6}
    assert len(asked.predictions) == len(PROBLEMS)
