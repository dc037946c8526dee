from __future__ import annotations

from pathlib import Path

import pytest

from perf import evaluation


def test_both_are_timed(sample_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"data.root={sample_data}", "--questions=4", "--batch-size=2", "--rounds=1", "--device=cpu"]
    assert evaluation.main(arguments) == 0
    printed = capsys.readouterr().out
    for text in ("bare generation", "evaluation", "4 questions", "throughput of bare generation"):
        assert text in printed


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation.main(["model=sphinx_sampel"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
