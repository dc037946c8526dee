from __future__ import annotations

from pathlib import Path

import pytest

from perf import generation


def test_all_are_timed(sample_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--rounds=1", "--device=cpu", "--batch=2"]
    sizes = ["--width=64", "--layers=1", "--heads=2", "--kv-heads=1", "--vocab=64", "--prompt=4", "--new=3"]
    assert generation.main(["transformers", *small, *sizes]) == 0
    assert "2 of 2 rows have the same tokens" in capsys.readouterr().out
    assert generation.main(["ways", *small, "--new=2"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in generation.WAYS)
    assert generation.main(["evaluation", *small, f"data.root={sample_data}", "--questions=2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("bare generation", "evaluation", "2 questions", "throughput of bare generation"):
        assert text in printed


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert generation.main(["evaluation", "model=sphinx_sampel"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
