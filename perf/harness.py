"""What all benchmarks share: configurations, turns, processes that are watched, tables, errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from sphinx_pl.checkpoints.folder import sync
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER, MISTAKES, register_resolvers, report
from sphinx_pl.utils.errors import UserError

TOKENIZER = Path(__file__).parents[1] / "tests/golden/tokenizer.model"


# -- commands --------------------------------------------------------------------------------------------------------


def parser(doc: str | None, overrides: str = "") -> argparse.ArgumentParser:
    """A parser with `--threads`, and with overrides of train.py's configuration if `overrides` says which."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if overrides:
        result.add_argument("overrides", nargs="*", help=f"of train.py's configuration: {overrides}")
    result.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    return result


def run_command(parser: argparse.ArgumentParser, measure: Callable[[Any], None], arguments: Any = None) -> int:
    """The exit code of a benchmark; a mistake of the user's is one line."""
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        measure(options)
    except MISTAKES as error:
        return report(error)
    return 0


def configuration(*overrides: str) -> Any:
    """The composed configuration of train.py."""
    register_resolvers()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return compose("train", list(overrides))


# -- tables ----------------------------------------------------------------------------------------------------------


def console() -> Console:
    """A console as wide as the tables, also in a log."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=200)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> Table:
    """A table whose first column is text and whose others are numbers."""
    result = Table(title=title, caption=caption or None)
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left")
    for row in rows:
        result.add_row(*row)
    return result


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median of several rounds with their range."""
    numbers = (statistics.median(values), min(values), max(values))
    return "{:.{d}f} ({:.{d}f}–{:.{d}f})".format(*numbers, d=digits)


def where(device: torch.device) -> str:
    """The device, for a title."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# -- turns -----------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, until the device has done its part."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def turns(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """The results of contenders in each round.

    They take turns, so that what slows the machine for a while slows all of them.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            results[name].append(contenders[name]())
    return results


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """The ratio of two contenders in each round."""
    return [a / b for a, b in zip(first, second, strict=True)]


# -- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process that wrote a folder.

    `ended` and `synced` are seconds from its start until it ended and until its bytes were on the disk. `peak` is MB of
    resident memory, mapped pages of files included; `anonymous` is MB without them.
    """

    written: int
    ended: float
    synced: float
    peak: float
    anonymous: float
    printed: str

    @property
    def gb(self) -> float:
        """GB that it wrote."""
        return self.written / 1e9


def run_process(command: Sequence[str], out: Path) -> Process:
    """The cost of a command that writes the folder `out`.

    Raises:
        UserError: it failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    log, peak, anonymous, begin = out.with_name(f"{out.name}.log"), 0.0, 0.0, time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None:
            with contextlib.suppress(StopIteration, OSError):  # it has just ended
                peak = max(peak, status("VmHWM", process.pid))
                anonymous = max(anonymous, status("RssAnon", process.pid))
            time.sleep(0.01)
    ended, printed = time.perf_counter() - begin, log.read_text()
    if process.returncode:
        raise UserError(f"{' '.join(command[:3])[:80]} failed: {printed.strip()[-2000:]}")
    files = [path for path in out.rglob("*") if path.is_file()]
    sync(*files, out)
    written = sum(file.stat().st_size for file in files)
    return Process(written, ended, time.perf_counter() - begin, peak, anonymous, printed)


def status(key: str, process: int | str = "self") -> float:
    """MB of a process: VmRSS, VmHWM, ..."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1000


def warm(folder: Path) -> None:
    """Read all files of a folder, so that they are in the page cache if there is room."""
    block = bytearray(2**24)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass
