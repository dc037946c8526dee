from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from rich.console import Console

from sphinx_pl.callbacks.progress import Progress, trainable_table
from sphinx_pl.callbacks.throughput import Throughput
from sphinx_pl.utils.console import StepBar

Fit = Callable[..., Any]


def console(terminal: bool, width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


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
    assert [line.split()[1] for line in lines] == ["3/6", "6/6", "6/6"]
    for line, validated, end in zip(lines, (2, 4, 6), ("left", "left", "taken"), strict=True):
        held_out = rf"held out after step {validated}:  text \d+\.\d{{3}}"
        assert re.search(rf"loss \d+\.\d{{3}}  [\d.]+k? tokens/s  {held_out}  \d:\d\d {end}$", line), line


def test_a_terminal_gets_a_bar_until_the_end(fit: Fit) -> None:
    screen = console(terminal=True)
    fit([Throughput(peak=1e12), Progress(console=screen)])
    lines = text(screen).splitlines()
    line, metrics = ([line for line in lines if word in line][-1] for word in ("left", "loss"))
    assert re.search(r"finetune ━+ 4/4  \d:\d\d elapsed  0:00 left$", line)
    assert re.search(r"loss \d+\.\d{3}  [\d.]+k? tokens/s  held out after step 4:  text \d+\.\d{3}$", metrics)


@pytest.mark.parametrize("width", [160, 80, 60, 40])
def test_bar_step_and_time_left_stay_however_narrow_the_terminal_is(width: int) -> None:
    screen = console(terminal=True, width=width)
    metrics = ["loss 2.345", "2.81k tokens/s", "held out after step 250:", *(f"source_{n} 1.23{n}" for n in range(8))]
    steps = StepBar(console=screen, auto_refresh=False)
    steps.add_task("pretrain_synthetic", total=12000, completed=3000, notes=metrics, left=3723.0)
    screen.print(steps.get_renderable())
    first, *rest = [line.rstrip() for line in text(screen).splitlines()]
    assert first.endswith("1:02:03 left")
    assert " 3000/12000 " in first
    bar_and_space = re.search(r"━.* (?=3000/12000)", first)
    assert bar_and_space is not None
    assert len(bar_and_space[0]) > 8
    assert ("elapsed" in first) == (width >= 80)
    assert max(map(len, [first, *rest])) <= width
    assert [part for line in rest for part in line.split("  ") if part] == metrics  # none is cut


def test_steps_that_were_not_finite_are_shown_once_there_are_any(fit: Fit) -> None:
    class Counts(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            pl_module.log("train/nonfinite_steps", 3.0 if trainer.global_step > 2 else 0.0)

    log = console(terminal=False)
    fit([Counts(), Progress(lines=4, console=log)], log_every_n_steps=1)
    lines = [line for line in text(log).splitlines() if line.startswith("finetune ")]
    assert ["3 not finite" in line for line in lines] == [False, False, True, True, True]


def test_a_failure_removes_the_bar(fit: Fit) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("as planned")

    screen = console(terminal=True)
    with pytest.raises(RuntimeError, match="as planned"):
        fit([Progress(console=screen), Fails()])
    screen.file = io.StringIO()
    with Console.status(screen, "free again"):  # rich allows only one live display
        pass


def test_the_table_adds_up() -> None:
    log = console(terminal=False)
    log.print(trainable_table("mix", [("decoder", 1200, 0), ("clip", 0, 34567)]))
    assert re.search(r"all +│ +1,200 │ +34,567", text(log))
