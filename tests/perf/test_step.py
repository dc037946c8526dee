from __future__ import annotations

from pathlib import Path

import pytest

from perf import step


def test_all_parts_and_layouts_are_timed(sample_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([f"data.root={sample_data}", "--steps=1", "--rows=2", "--threads=1", "--device=cpu"]) == 0
    printed = capsys.readouterr().out
    for name in (*step.PARTS, *step.LAYOUTS):
        assert name in printed


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["model=sphinx_sampel"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
