"""Runs a point of a sweep as its own command: `python train.py <the point's overrides>
hydra.run.dir=<its folder>`.

Points with several processes cannot run one after another in a single process. Their other
processes start with the same command line, and `-m` in it would start the sweep again. So the
sweeping process trains nothing.
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
"""The environment variable with the file in which a point leaves its value for the sweeper."""


def swept(overrides: Sequence[str], sweep: Sequence[str]) -> str:
    """The overrides that distinguish this point from the others of the sweep."""
    return " ".join(override for override in overrides if override not in sweep)


def point_name(hydra: DictConfig) -> str:
    """Return `swept` of the point that Hydra runs in this process, or "" outside of a sweep."""
    if not _sweeping(hydra):
        return ""
    # Hydra stores the overrides of the sweep only here.
    file = Path(str(hydra.sweep.dir)) / "multirun.yaml"
    sweep = OmegaConf.load(file).hydra.overrides.task if file.is_file() else []
    return swept(list(hydra.overrides.task), list(sweep))


def _sweeping(hydra: DictConfig) -> bool:
    return hydra.mode is not None and hydra.mode.name == "MULTIRUN"


def needs_a_process(cfg: DictConfig, hydra: DictConfig) -> bool:
    """Return whether this is a point that several processes train.

    Raises:
        UserError: several processes sweep.
    """
    if not _sweeping(hydra):
        return False
    if starter := this_process().starter:
        raise UserError(
            f"-m below {starter}: each of its processes would start the sweep; start it once, with "
            "hydra/launcher=slurm for a job per point, or with trainer.devices=N to run the points here in turn"
        )
    return str(cfg.trainer.devices) != "1" or cfg.trainer.get("num_nodes", 1) != 1


def command(hydra: DictConfig, overrides: Sequence[str], folder: str, name: str) -> list[str]:
    """Return the command of a point, to be run in the folder where the sweep was started.

    Args:
        hydra: the sweep's configuration of Hydra.
        overrides: all overrides of the point.
        folder: the point's run folder.
        name: the value of the key `point`.
    """
    import __main__

    spec = getattr(__main__, "__spec__", None)
    script = [str(Path(sys.argv[0]).resolve())] if spec is None else ["-m", spec.name]
    # The point itself does not sweep. In some versions `hydra/launcher=...` is among the point's
    # own overrides.
    sweeping = ("hydra.mode=", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper", "hydra.run.dir=")
    own = [o for o in [*hydra.overrides.hydra, *overrides] if not o.lstrip("+~").startswith((*sweeping, "point="))]
    return [sys.executable, *script, *own, f"hydra.run.dir={_quoted(folder)}", f"point={_quoted(name)}"]


def _quoted(text: str) -> str:
    """Return the text as a quoted value of Hydra's grammar."""
    return "'" + text.replace("'", r"\'") + "'"


def run(command: Sequence[str], value: Path) -> int:
    """Run a point, which leaves its value in the file `value`.

    Return its exit code, or minus the signal that killed it.

    Signals to this process are passed on to the point. A scheduler signals the point too, which
    then notes the signal twice.
    """
    process = subprocess.Popen(command, env={**os.environ, VALUE: str(value)})
    handlers = {number: signal.getsignal(number) for number in (*signals.SIGNALS, signals.INTERRUPT)}
    for number in signals.SIGNALS:
        signal.signal(number, lambda number, _: process.send_signal(number))
    signal.signal(signals.INTERRUPT, lambda *_: None)  # a terminal sends Ctrl-C to both
    try:
        return process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def value_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "value"


def stopped(code: int) -> bool:
    """Return whether it is the exit code of a process that a signal stopped."""
    return code < 0 or code > 128


def read_value(path: Path) -> float | None:
    return float(path.read_text()) if path.is_file() else None


def leave_value(value: float | None) -> None:
    """Leave the value of a point for the sweeping process.

    The process that trained the point calls it.
    """
    if VALUE in os.environ and value is not None and this_process().rank == 0:
        Path(os.environ[VALUE]).write_text(repr(value))


def run_point(cfg: DictConfig, hydra: DictConfig) -> float | None:
    """Train this point in its own process.

    Raises:
        UserError: the point failed. Its own output tells why.
        SystemExit: a signal stopped the point.
    """
    arguments = command(hydra, list(hydra.overrides.task), hydra.runtime.output_dir, cfg.point)
    with value_file() as path:
        code = run(arguments, path)
        if stopped(code):
            sys.exit(code % 256)
        if code:
            raise UserError(f"the point '{cfg.point}' failed with exit code {code}, see above")
        return read_value(path)
