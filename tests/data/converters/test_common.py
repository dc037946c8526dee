"""What the converters share."""

from __future__ import annotations

from typing import Any

import pytest

from sphinx_pl.data.converters.common import choice_record, choice_turn, chosen, keyed, most_frequent, question_record
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS


def test_entries_without_an_id_are_keyed_too() -> None:
    entries = [{"id": 5}, {"id": "a"}, {"id": [1]}, {}, "broken"]
    assert [key for key, _ in keyed(entries, "id")] == ["5", "a", "#2", "#3", "#4"]
    assert [key for key, _ in keyed(entries, "id", unique=False)] == ["0-5", "1-a", "#2", "#3", "#4"]


def test_of_the_most_frequent_answers_the_first_is_taken() -> None:
    assert most_frequent(["dog", "cat", "Cat ", "Dog", ""]) == "dog"
    assert most_frequent(["dog", "cat", "cat "]) == "cat"
    with pytest.raises(SkipSample):
        most_frequent(["", " "])
    with pytest.raises(TypeError):
        most_frequent("dog")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "task", "written"),
    [("Yes.", "yes_no", "yes"), (" no", "yes_no", "no"), ("No idea", "short_vqa", "No idea")],
)
def test_yes_and_no_have_their_own_task(answer: str, task: str, written: str) -> None:
    record = question_record("1", "a.jpg", "Is it?", answer, {})
    assert (record.task, record.answer) == (task, written)


@pytest.mark.parametrize(
    ("choices", "index", "reason"),
    [
        (["a", "b"], 2, "choice_missing"),
        (["a", "b"], -1, "choice_missing"),
        (["a", "b"], "1", "choice_missing"),
        (["a"], 0, "choices_count"),
        ("ab", 0, "choices_count"),
        (["a"] * 27, 0, "choices_count"),
    ],
)
def test_a_choice_that_is_not_there(choices: Any, index: Any, reason: str) -> None:
    with pytest.raises(SkipSample) as caught:
        chosen(choices, index)
    assert caught.value.reason == reason


@pytest.mark.parametrize("right", [0, 1])
def test_options_that_read_alike_are_refused_whichever_is_right(right: int) -> None:
    with pytest.raises(SkipSample, match="choices_repeated"):
        choice_record("1", "a.jpg", "Which?", ["a", "b", "b "], right, {})


def test_a_written_choice_reads_as_the_task_writes_it() -> None:
    record = choice_record("1", "a.jpg", "Which?", ["a", "b"], 1, {})
    assert (choice_turn("Which?", ["a", "b"], 1),) == TASKS["multiple_choice"].turns(record, Coordinates())
