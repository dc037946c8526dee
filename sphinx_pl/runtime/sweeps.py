"""A point of a sweep as a command of its own: `python train.py <the point's overrides> hydra.run.dir=<its folder>`.

Points that need several processes can't follow each other in one: the processes beside the first are started with its
command line, and `-m` in it would start the sweep again. So the process that sweeps trains nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sphinx_pl.runtime import signals
from sphinx_pl.runtime.ranks import this_process
from sphinx_pl.utils.errors import UserError

VALUE = "SPHINX_POINT_VALUE"
"""Environment variable: the file in which a point leaves its value for the sweeper."""


def swept(overrides: Sequence[str], sweep: Sequence[str]) -> str:
    """What tells this point from the others: its overrides that are not those of the whole sweep."""
    return " ".join(override for override in overrides if override not in sweep)


def point_name(hydra: DictConfig) -> str:
    """`swept` of the point that Hydra runs in this process; "" outside of a sweep."""
    if not _sweeping(hydra):
        return ""
    # Hydra keeps the sweep's own overrides only here.
    whole = Path(str(hydra.sweep.dir)) / "multirun.yaml"
    sweep = OmegaConf.load(whole).hydra.overrides.task if whole.is_file() else []
    return swept(list(hydra.overrides.task), list(sweep))


def _sweeping(hydra: DictConfig) -> bool:
    return hydra.mode is not None and hydra.mode.name == "MULTIRUN"


def needs_a_process(cfg: DictConfig, hydra: DictConfig) -> bool:
    """Whether this is a point that several processes train.

    Raises:
        UserError: each of several processes sweeps.
    """
    if not _sweeping(hydra):
        return False
    if starter := this_process().starter:
        raise UserError(
            f"-m below {starter}: each of its processes would start the sweep; start it once, with "
            "hydra/launcher=slurm for a job for each point, or with trainer.devices=N for one after the other here"
        )
    return str(cfg.trainer.devices) != "1" or cfg.trainer.get("num_nodes", 1) != 1


def command(hydra: DictConfig, overrides: Sequence[str], folder: str, name: str) -> list[str]:
    """The command of a point, to be run in the folder that the sweep was started in.

    Args:
        hydra: of the sweep.
        overrides: all of the point's.
        folder: the point's run folder.
        name: what `point` will be.
    """
    import __main__

    spec = getattr(__main__, "__spec__", None)
    script = [str(Path(sys.argv[0]).resolve())] if spec is None else ["-m", spec.name]
    # What belongs to sweeping is done; `hydra/launcher=...` stands among the point's own overrides in some versions.
    sweeping = ("hydra.mode=", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper", "hydra.run.dir=")
    own = [o for o in [*hydra.overrides.hydra, *overrides] if not o.lstrip("+~").startswith((*sweeping, "point="))]
    return [sys.executable, *script, *own, f"hydra.run.dir={_quoted(folder)}", f"point={_quoted(name)}"]


def _quoted(text: str) -> str:
    """As a quoted value of Hydra's grammar."""
    return "'" + text.replace("'", r"\'") + "'"


def run(command: Sequence[str], value: Path) -> int:
    """Run a point, which leaves its value in the file `value`. Its exit code, or minus the signal that it died of.

    Signals that come to this process go on to it. A scheduler has signalled it as well; it notes that once more.
    """
    process = subprocess.Popen(command, env={**os.environ, VALUE: str(value)})
    before = {number: signal.getsignal(number) for number in (*signals.SIGNALS, signals.INTERRUPT)}
    for number in signals.SIGNALS:
        signal.signal(number, lambda number, _: process.send_signal(number))
    signal.signal(signals.INTERRUPT, lambda *_: None)  # a terminal sends Ctrl-C to both: twice would not let it save
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def value_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "value"


def stopped(code: int) -> bool:
    """Whether it is the exit code of a process that was stopped by a signal."""
    return code < 0 or code > 128


def read_value(path: Path) -> float | None:
    return float(path.read_text()) if path.is_file() else None


def leave_value(value: float | None) -> None:
    """In the process that trained a point: its value, for the one that sweeps."""
    if VALUE in os.environ and value is not None and this_process().rank == 0:
        Path(os.environ[VALUE]).write_text(repr(value))


def run_point(cfg: DictConfig, hydra: DictConfig) -> float | None:
    """Train this point in a process of its own.

    Raises:
        UserError: it failed; what it printed says why.
        SystemExit: it was stopped by a signal.
    """
    arguments = command(hydra, list(hydra.overrides.task), hydra.runtime.output_dir, cfg.point)
    with value_file() as path:
        code = run(arguments, path)
        if stopped(code):
            sys.exit(code % 256)
        if code:
            raise UserError(f"the point '{cfg.point}' failed with exit code {code}, see above")
        return read_value(path)
