from __future__ import annotations

import time
from pathlib import Path

import pytest

from perf import threads
from sphinx_pl.utils.errors import UserError


def test_settings_are_compared_in_every_situation(sample_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [f"data.root={sample_data}", "--settings", "one thread", "--rounds=1", "--seconds=0.1"]
    assert threads.main(arguments) == 0
    printed = capfd.readouterr().out
    [row] = [line for line in printed.splitlines() if "one thread" in line]
    rates = [float(word.replace(",", "")) for word in row.replace("│", " ").split() if word[0].isdigit()]
    assert len(rates) == len(threads.SITUATIONS)
    assert min(rates) > 0
    assert "medians of 1 rounds" in printed


def test_without_time_it_ends_at_once(sample_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert threads.main([f"data.root={sample_data}", "--settings", "one thread", "--limit=0"]) == 0
    assert time.monotonic() - start < 5
    assert "ended after 0 s: --limit takes more" in capfd.readouterr().out


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert threads.main(["--work", "model=sphinx_sampel"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model=sphinx_sampel: there is no file")


def test_a_process_that_ends_is_noticed() -> None:
    with threads.Worker({}, ["--no-such-option"]) as worker, pytest.raises(UserError, match="ended with exit code 2"):
        worker.read(time.monotonic() + 300)
