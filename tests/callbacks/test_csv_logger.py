"""metrics.csv survives a kill and a resume."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from callbacks.csv_logger import MetricsCSV, forget_after


def log(folder: Path, *rows: tuple[int, dict[str, float]]) -> None:
    """A process of its own, as far as the logger knows."""
    logger = MetricsCSV(str(folder), flush_every_n_steps=1)
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
    logger.finalize("success")


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_resumed_run_goes_on_with_the_file(tmp_path: Path) -> None:
    log(tmp_path, (0, {"b": 1.5}), (1, {"b": 2.5}))
    log(tmp_path, (2, {"b": 3.5}))
    assert (tmp_path / "metrics.csv").read_bytes() == b"b,step\r\n1.5,0\r\n2.5,1\r\n3.5,2\r\n"


def test_new_columns_join_the_old_ones_in_alphabetical_order(tmp_path: Path) -> None:
    log(tmp_path, (0, {"b": 1.5}))
    log(tmp_path, (1, {"b": 2.5, "a": 1.0}), (2, {"c": 4.0}))
    assert read(tmp_path) == [
        {"a": "", "b": "1.5", "c": "", "step": "0"},
        {"a": "1.0", "b": "2.5", "c": "", "step": "1"},
        {"a": "", "b": "", "c": "4.0", "step": "2"},
    ]
    assert (tmp_path / "metrics.csv").read_text().startswith("a,b,c,step\n")


def test_steps_that_will_be_made_again_are_dropped(tmp_path: Path) -> None:
    log(tmp_path, *((step, {"loss": float(step), "note": 0.5}) for step in range(12)))
    forget_after(tmp_path / "metrics.csv", 10)  # a checkpoint of 10 steps: the rows 0 .. 9 are behind it
    assert [row["step"] for row in read(tmp_path)] == [str(step) for step in range(10)]
    log(tmp_path, (10, {"loss": -1.0, "note": 0.5}))
    assert read(tmp_path)[-1] == {"loss": "-1.0", "note": "0.5", "step": "10"}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("written", range(len("1.25,1,7.5\r\n")))
def test_half_a_row_is_dropped_wherever_the_kill_came(tmp_path: Path, written: int) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"loss,step,zeta\r\n2.0,0,8.5\r\n" + b"1.25,1,7.5\r\n"[:written])
    forget_after(path, 5)
    assert read(tmp_path) == [{"loss": "2.0", "step": "0", "zeta": "8.5"}]


@pytest.mark.parametrize("content", [b"", b"loss,st", b"loss,step\r\n"])
def test_a_file_without_rows_can_be_gone_on_with(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    forget_after(tmp_path / "metrics.csv", 3)
    log(tmp_path, (3, {"loss": 1.0}))
    assert read(tmp_path) == [{"loss": "1.0", "step": "3"}]


def test_without_a_file_there_is_nothing_to_forget(tmp_path: Path) -> None:
    forget_after(tmp_path / "metrics.csv", 3)
    assert list(tmp_path.iterdir()) == []
