"""metrics.csv has a row for each step, and survives a kill and a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.callbacks.csv_logger import MetricsCSV, forget_after
from sphinx_pl.callbacks.evaluation import Evaluation
from sphinx_pl.callbacks.throughput import Throughput
from sphinx_pl.callbacks.validation import ValidateAtEnds
from sphinx_pl.utils.metrics_csv import read_metrics


def log(folder: Path, *rows: tuple[int, dict[str, float]], every: int = 1) -> None:
    """Return the rows after a separate process, as far as the logger knows."""
    logger = MetricsCSV(str(folder), flush_every_n_steps=every)
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
    logger.finalize("success")


def read(folder: Path) -> list[tuple[int, dict[str, str]]]:
    return list(read_metrics(folder / "metrics.csv")[1].items())


def test_all_values_of_a_step_are_one_row_that_counts_the_steps_made(
    fit: Callable[..., Any], test_sources: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    evaluation = Evaluation(test_sources, limit=1, every_n_steps=3)
    callbacks = [Throughput(peak=1e12), ValidateAtEnds(), evaluation]
    fit(callbacks, [MetricsCSV(str(tmp_path), 1)], steps=5, log_every_n_steps=1, val_check_interval=2 * 2)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,")
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "1", "2", "3", "4", "5"]
    for step, row in read(tmp_path):
        assert ("train/loss" in row) == ("perf/time_step" in row) == ("data/seen/tasks" in row) == (step > 0)
        assert ("val/loss" in row) == (step in (0, 2, 4, 5))
        assert ("eval/mean" in row) == (step == 3)


def test_a_resumed_run_continues_the_file(tmp_path: Path) -> None:
    log(tmp_path, (1, {"b": 1.5}), (2, {"b": 2.5}))
    log(tmp_path, (2, {"b": 2.25}), (3, {"b": 3.5}))
    assert (tmp_path / "metrics.csv").read_bytes() == b"step,b\r\n1,1.5\r\n2,2.25\r\n3,3.5\r\n"


def test_new_columns_join_the_old_ones_in_alphabetical_order(tmp_path: Path) -> None:
    log(tmp_path, (1, {"b": 1.5}))
    log(tmp_path, (2, {"b": 2.5, "a": 1.0}), (3, {"c": 4.0}))
    assert (tmp_path / "metrics.csv").read_bytes() == b"step,a,b,c\r\n1,,1.5,\r\n2,1.0,2.5,\r\n3,,,4.0\r\n"


@pytest.mark.parametrize("every", [1, 2, 10])
def test_a_later_value_of_a_step_joins_its_row(every: int, tmp_path: Path) -> None:
    wide = {f"m{n}": n / 7 for n in range(40)}
    log(tmp_path, *((step, part) for step in range(1, 5) for part in (wide, {"val": step + 0.5})), every=every)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 5
    assert [row for _, row in read(tmp_path)] == [
        {name: repr(value) for name, value in {**wide, "val": step + 0.5}.items()} for step in range(1, 5)
    ]


def test_steps_that_will_be_made_again_are_dropped(tmp_path: Path) -> None:
    log(tmp_path, *((step, {"loss": float(step), "note": 0.5}) for step in range(13)))
    forget_after(tmp_path / "metrics.csv", 10)  # a checkpoint of 10 steps
    assert [step for step, _ in read(tmp_path)] == list(range(11))
    log(tmp_path, (11, {"loss": -1.0, "note": 0.5}))
    assert read(tmp_path)[-1] == (11, {"loss": "-1.0", "note": "0.5"})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


OLD = b"""epoch,perf/mfu,step,train/loss,val/loss\r
0,,0,,5.5\r
,,0,3.5,\r
,0.25,0,,\r
,,1,3.0,\r
,0.5,1,,\r
0,,1,,2.5\r
,,2,2.0,\r
,0.75,2,,\r
0,,3,,1.5\r
"""
"""A file of an older version: three steps, validated before the first, after the second and at the
end.
"""


def test_a_file_of_an_older_version_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(OLD)
    columns, rows = read_metrics(path)
    assert columns == ["epoch", "perf/mfu", "train/loss", "val/loss"]
    assert {step: (row.get("train/loss"), row.get("perf/mfu"), row.get("val/loss")) for step, row in rows.items()} == {
        0: (None, None, "5.5"),
        1: ("3.5", "0.25", None),
        2: ("3.0", "0.5", "2.5"),
        3: ("2.0", "0.75", "1.5"),
    }
    forget_after(path, 2)
    assert [step for step, _ in read(tmp_path)] == [0, 1, 2]
    assert path.read_text().startswith("step,epoch,")
    path.write_bytes(OLD)
    log(tmp_path, (4, {"train/loss": 1.0}))  # a finished run that continues with more steps
    assert [(step, row.get("train/loss")) for step, row in read(tmp_path)][1:] == [
        (1, "3.5"),
        (2, "3.0"),
        (3, "2.0"),
        (4, "1.0"),
    ]
    assert path.read_text().startswith("step,epoch,")


@pytest.mark.parametrize("written", range(len("2,1.25,7.5\r\n")))
def test_half_a_row_is_dropped_wherever_the_kill_came(tmp_path: Path, written: int) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,loss,zeta\r\n1,2.0,8.5\r\n" + b"2,1.25,7.5\r\n"[:written])
    forget_after(path, 5)
    assert path.read_bytes() == b"step,loss,zeta\r\n1,2.0,8.5\r\n"


@pytest.mark.parametrize("content", [b"", b"loss,st", b"loss,step\r\n", b"step,loss\r\n"])
def test_a_file_without_rows_can_be_continued(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    forget_after(tmp_path / "metrics.csv", 3)
    log(tmp_path, (4, {"loss": 1.0}))
    assert read(tmp_path) == [(4, {"loss": "1.0"})]


def test_without_a_file_there_is_nothing_to_forget(tmp_path: Path) -> None:
    forget_after(tmp_path / "metrics.csv", 3)
    assert list(tmp_path.iterdir()) == []
