from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from rich.console import Console

from callbacks.progress import Progress, trainable_table
from callbacks.throughput import Throughput

Fit = Callable[..., Any]


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_file_gets_the_table_and_a_few_lines(fit: Fit) -> None:
    log = console(terminal=False)
    _, stage = fit([Throughput(peak=1e12), Progress(lines=2, console=log)], steps=6, train_parts=["decoder"])
    decoder = sum(parameter.numel() for parameter in stage.sphinx.decoder.parameters())
    everything = sum(parameter.numel() for parameter in stage.sphinx.parameters())
    table = re.findall(r"│ (\w+) +│ +(\S+) │ +(\S+) │", text(log))
    assert ("decoder", f"{decoder:,}", "–") in table
    assert ("all", f"{decoder:,}", f"{everything - decoder:,}") in table
    lines = [line for line in text(log).splitlines() if line.startswith("finetune ")]
    assert [line.split()[1] for line in lines] == ["3/6", "6/6"]
    for line in lines:
        assert re.search(r"loss \d+\.\d{3}  held out text \d+\.\d{3}  [\d.]+k? tokens/s  \d:\d\d left$", line), line


def test_a_terminal_gets_a_bar_that_goes_on_to_the_end(fit: Fit) -> None:
    screen = console(terminal=True)
    fit([Throughput(peak=1e12), Progress(console=screen)])
    last = [line for line in text(screen).splitlines() if "finetune" in line][-1]
    assert "4/4" in last
    assert re.search(r"loss \d+\.\d{3}  held out text \d+\.\d{3}  [\d.]+k? tokens/s", last)


def test_steps_that_were_not_finite_are_told_once_there_are_any(fit: Fit) -> None:
    class Counts(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            pl_module.log("train/nonfinite_steps", 3.0 if trainer.global_step > 2 else 0.0)

    log = console(terminal=False)
    fit([Counts(), Progress(lines=4, console=log)], log_every_n_steps=1)
    lines = [line for line in text(log).splitlines() if line.startswith("finetune ")]
    assert ["3 not finite" in line for line in lines] == [False, False, True, True]


def test_the_bar_is_gone_after_a_failure(fit: Fit) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("as planned")

    screen = console(terminal=True)
    with pytest.raises(RuntimeError, match="as planned"):
        fit([Progress(console=screen), Fails()])
    screen.file = io.StringIO()
    with Console.status(screen, "free again"):  # rich allows one live display: a bar left behind would be in the way
        pass


def test_the_table_adds_up() -> None:
    log = console(terminal=False)
    log.print(trainable_table("mix", [("decoder", 1200, 0), ("clip", 0, 34567)]))
    assert re.search(r"all +│ +1,200 │ +34,567", text(log))
