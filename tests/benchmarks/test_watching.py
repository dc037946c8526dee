from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from benchmarks import watching
from benchmarks.watching import Block, Cost


def test_all_that_watches_is_timed(
    sample_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = [
        f"data.root={sample_data}",
        "trainer=cpu",
        "data.packing.micro_batch_rows=2",
        "--pairs=1",
        "--log-every=2",
    ]
    assert watching.main([*arguments, "--threads=1"]) == 0
    printed = capsys.readouterr().out
    for name in ("Throughput", "Progress", "losses by task and source", "all", "1 pairs of blocks"):
        assert name in printed


def test_the_share_is_time_inside_over_a_step_without_it() -> None:
    watched = [Block(True, seconds, {"a": 0.2, "b": 0.1}) for seconds in (2.2, 9.0, 2.4)]
    plain = [Block(False, seconds) for seconds in (2.0, 2.0, 2.0)]
    cost = Cost([block for pair in zip(watched, plain, strict=True) for block in pair], steps=10)
    assert cost.step == pytest.approx(0.2)
    assert cost.inside == pytest.approx({"a": 0.02, "b": 0.01})
    assert cost.share == pytest.approx(0.15)
    assert cost.difference[0] == pytest.approx(0.2)  # the median pair


def test_a_callback_that_works_is_found_by_both_measures(sample_data: Path, tmp_path: Path) -> None:
    class Works(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            sum(range(12_000_000))  # long enough to stand out of a busy machine's noise

    options = watching.parser().parse_args(
        [f"data.root={sample_data}", "data.packing.micro_batch_rows=2", "trainer=cpu"]
    )
    options.log_every = 2
    stage, data, trainer, _ = watching.build(options, tmp_path)
    cost = watching.measure(stage, data, trainer, [Works()], pairs=3)
    assert [block.watched for block in cost.blocks] == [False, True, True, False, False, True]
    assert all(not block.inside for block in cost.blocks if not block.watched)
    seconds = cost.inside["Works"]
    assert 0.02 < seconds < 2
    assert cost.difference[0] == pytest.approx(cost.share, rel=0.5)


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert watching.main(["model=sphinx_sampel"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
