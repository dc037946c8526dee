"""What was answered is there after a kill, and only for the same questions and settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.evaluation.answer_log import AnsweredBatch, AnswerLog
from sphinx_pl.utils.errors import UserError

SETTINGS = {"checkpoint": "abc", "precision": "fp32"}
FIRST, SECOND = AnsweredBatch({0: "yes", 4: 'a "quoted"\nline'}, {}), AnsweredBatch({2: "no"}, {"image_missing": 1})


def test_batches_of_all_ranks_come_back(tmp_path: Path) -> None:
    for rank, (number, answered) in enumerate([(0, FIRST), (1, SECOND)]):
        answer_log = AnswerLog(tmp_path, "pope", SETTINGS)
        assert len(answer_log.open("q", rank)) == rank
        answer_log.append(number, answered)
        answer_log.close()
    assert AnswerLog(tmp_path, "pope", SETTINGS).open("q") == {0: FIRST, 1: SECOND}
    assert AnswerLog(tmp_path, "mme", SETTINGS).open("q") == {}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_off_does_not_count_and_does_not_spoil_the_next(tmp_path: Path, cut: int) -> None:
    answer_log = AnswerLog(tmp_path, "pope", SETTINGS)
    answer_log.open("q")
    answer_log.append(0, FIRST)
    answer_log.append(1, SECOND)
    answer_log.close()
    path = tmp_path / "pope.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    answer_log = AnswerLog(tmp_path, "pope", SETTINGS)
    assert answer_log.open("q") == {0: FIRST}
    answer_log.append(1, SECOND)
    answer_log.close()
    assert AnswerLog(tmp_path, "pope", SETTINGS).open("q") == {0: FIRST, 1: SECOND}


def test_other_questions_or_settings_are_refused_unless_overwritten(tmp_path: Path) -> None:
    answer_log = AnswerLog(tmp_path, "pope", SETTINGS)
    answer_log.open("q")
    answer_log.append(0, FIRST)
    answer_log.close()
    with pytest.raises(UserError, match=r"other settings \(questions\).*overwrite=true"):
        AnswerLog(tmp_path, "pope", SETTINGS).open("p")
    with pytest.raises(UserError, match=r"\(precision\)"):
        AnswerLog(tmp_path, "pope", SETTINGS | {"precision": "bf16"}).open("q")
    assert AnswerLog(tmp_path, "pope", SETTINGS, overwrite=True).open("p") == {}


def test_asking_anew_forgets_the_answers_of_ranks_that_are_no_more(tmp_path: Path) -> None:
    for rank in range(3):
        answer_log = AnswerLog(tmp_path, "pope", SETTINGS)
        answer_log.open("q", rank, 3)
        answer_log.append(rank, FIRST)
        answer_log.close()
    for rank in reversed(range(2)):  # the first one's files are not the second one's business
        answer_log = AnswerLog(tmp_path, "pope", SETTINGS, overwrite=True)
        assert answer_log.open("q", rank, 2) == {}
        answer_log.append(rank, SECOND)
        answer_log.close()
    assert AnswerLog(tmp_path, "pope", SETTINGS).open("q") == {0: SECOND, 1: SECOND}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    answer_log = AnswerLog(tmp_path, "pope", SETTINGS)
    answer_log.open("q")
    answer_log.close()
    path = tmp_path / "pope.rank0.jsonl"
    path.write_bytes(path.read_bytes() + b"{oops\n")
    with pytest.raises(UserError, match=r"pope\.rank0\.jsonl' is damaged"):
        AnswerLog(tmp_path, "pope", SETTINGS).open("q")
