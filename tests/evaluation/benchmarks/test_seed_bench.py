"""Structure: DATASET.md and eval.py of https://github.com/AILab-CVC/SEED-Bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphinx_pl.data.schema import ImageRef
from sphinx_pl.evaluation.benchmarks.seed_bench import SEEDBenchBenchmark

from .conftest import Ask, Say

Write = Callable[..., Path]
TYPES = {"Scene Understanding": 1, "Instances Counting": 5, "Text Understanding": 9, "Action Recognition": 10}


def entry(number: str, kind: int = 5, **more: Any) -> dict[str, Any]:
    choices = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), ("One", "Two", "Three", "Four"), strict=True))
    values = {"question_id": number, "question_type_id": kind, "question": "How many towels are in the image?"}
    return values | choices | {"answer": "B", "data_id": "1454426_2591111986", "data_type": "image"} | more


def document(*questions: Any) -> dict[str, Any]:
    return {"SEED-Bench.json": {"questions": list(questions), "question_type": TYPES}}


def test_questions_are_read_scored_and_parted(ask: Ask, write: Write, question: Say) -> None:
    src = write(
        document(
            entry("101669"),
            entry("7", 1, answer="D"),
            entry("v1738", 10, data_type="video", data_id="94328.webm"),
            entry("8", 9, choice_c="Two"),  # two choices read the same: there is still one right letter
        )
    )
    asked = ask(SEEDBenchBenchmark(src), lambda record: record.meta["letter"])
    assert [record.key for record in asked.questions.records] == ["it/101669", "it/7", "it/8"]
    first = asked.questions.records[0]
    assert first.images == (ImageRef(str(src / "1454426_2591111986")),)
    assert question(first) == (
        "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert asked.values == {("accuracy", ""): 1, **{("accuracy", name): 1 for name in TYPES if TYPES[name] < 10}}
    answers = {
        "it/101669": "Two.",
        "it/7": "A",
        "it/8": "Two",
    }  # the choice's text; wrong; a text that two letters have
    asked = ask(SEEDBenchBenchmark(src), lambda record: answers[record.key])
    assert asked.values["accuracy", ""] == 1 / 3
    assert asked.values["accuracy", "Text Understanding"] == 0
    assert asked.result["unparsed"] == 1


def test_what_cannot_be_read_as_a_letter_is_wrong(ask: Ask, write: Write) -> None:
    asked = ask(SEEDBenchBenchmark(write(document(entry("1")))), lambda record: "It might be B or C, I cannot tell")
    assert (asked.values["accuracy", ""], asked.result["unparsed"]) == (0, 1)


def test_odd_entries_are_counted(ask: Ask, write: Write) -> None:
    odd = [
        entry("1", answer="E"),
        entry("2", answer=None),
        entry("3", choice_d=None),
        entry("4", 11),
        entry("5", question=" "),
        entry("5"),
        entry("6", data_id=["a", "b"]),
        {"question_id": "7"},
        "text",
        None,
    ]
    asked = ask(SEEDBenchBenchmark(write(document(entry("0"), *odd))), lambda record: "B")
    assert len(asked.predictions) == 1
    assert asked.result["lost"] == {
        "choice_missing": 1,
        "question_empty": 1,
        "duplicate_key": 1,
        "entry_malformed": 7,
    }
