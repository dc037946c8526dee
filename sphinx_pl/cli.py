"""Entry scripts: Hydra's `main`, with mistakes answered in one line."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sphinx_pl.errors import UserError
from sphinx_pl.processes import count_devices, first_process

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "conf"
TRACEBACK = "SPHINX_TRACEBACK"
FAILED = "SPHINX_STEP_FAILED"
MISTAKES = (UserError, HydraException, InstantiationException, OmegaConfBaseException)
INTERRUPTED = 128 + signal.SIGINT
"""Exit code, as a shell's."""


def one_line(error: BaseException) -> str:
    """The sentence to print. Hydra wraps errors of what it instantiates; the cause is what the user did."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return " ".join(str(cause).split())
        cause = cause.__cause__
    said = str(error)
    if said.startswith("Error merging override") and error.__cause__ is not None:
        said += f": {error.__cause__}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("object_type", "reference_type"))]
    return "; ".join(kept) or type(error).__name__


def report(error: BaseException) -> int:
    """Print the error as one line on stderr; returns the exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


def _validation_interval(every: int, max_steps: int, accumulate: int) -> int:
    """Optimizer steps between validations (0: only at the end) in micro-batches, Lightning's unit."""
    return int(every or max_steps) * int(accumulate)


def _micro_batches(rows_per_step: int | None, rows: int, devices: Any, num_nodes: int) -> int:
    """Of an optimizer step on each rank, so that all ranks together have `rows_per_step` rows in it."""
    if rows_per_step is None:
        return 1
    if (per_node := count_devices(devices)) is None:  # as many as there are
        import torch

        per_node = max(1, torch.cuda.device_count())
    at_once = int(rows) * per_node * int(num_nodes)
    if rows_per_step % at_once:
        raise UserError(
            f"stage.rows_per_step={rows_per_step} is not a multiple of data.packing.rows={rows} * {per_node} * "
            f"{num_nodes} (trainer.devices, trainer.num_nodes): change one of them, or set stage.accumulate instead"
        )
    return int(rows_per_step) // at_once


def _mixed_precision(accelerator: str) -> str:
    """bf16 autocast over fp32 weights; fp32 on a CPU without bf16 instructions, where bf16 takes twice as long."""
    import torch

    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        about = Path("/proc/cpuinfo")
        words = about.read_text().split() if about.exists() else ()
        return "bf16-mixed" if {"avx512_bf16", "amx_bf16"}.intersection(words) else "32-true"
    return "bf16-mixed"


def _run_folder(plan: bool, folder: str) -> str:
    """Hydra writes into a run's folder before the script begins: a plan, which is to leave none, gets one that goes."""
    if not plan:
        return folder
    temporary = tempfile.mkdtemp(prefix="plan-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def register_resolvers() -> None:
    """What the configurations in conf/ compute with, besides Hydra's and OmegaConf's own."""
    OmegaConf.register_new_resolver("validation_interval", _validation_interval, replace=True)
    OmegaConf.register_new_resolver("micro_batches", _micro_batches, replace=True)
    OmegaConf.register_new_resolver("mixed_precision", _mixed_precision, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True, use_cache=True)


def note_failure(error: BaseException) -> None:
    """Make the file that `SPHINX_STEP_FAILED` names, unless this is no failure but a signal or a regular end.

    Of a task that fails srun says SIGTERM, if it has ended the other tasks by that (`--kill-on-bad-exit`).
    """
    code = error.code if isinstance(error, SystemExit) else 1
    fails = not isinstance(error, KeyboardInterrupt) and (0 < code < 128 if isinstance(code, int) else code is not None)
    if (file := os.environ.get(FAILED)) and fails:
        with contextlib.suppress(OSError):
            Path(file).touch()


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """`hydra.main` on `conf/<config_name>.yaml`. Errors that a user can cause end in one line and exit code 2.

    With the environment variable SPHINX_TRACEBACK=1 they end in a traceback.
    """
    register_resolvers()

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(main)
        def guarded(cfg: DictConfig) -> Any:
            # Caught before Hydra adds lines of its own.
            try:
                return main(cfg)
            except MISTAKES as error:
                if os.environ.get(TRACEBACK) == "1":
                    raise
                sys.exit(report(error))

        run = hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=config_name)(guarded)

        @functools.wraps(main)
        def wrapped() -> Any:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing and exiting
            gc.freeze()  # what was imported stays: no collection needs to look through it
            try:
                if not first_process():  # the run folder is the first one's
                    sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=other_ranks"]
                return run()
            except BaseException as error:
                note_failure(error)
                if isinstance(error, KeyboardInterrupt) and os.environ.get(TRACEBACK) != "1":
                    print("interrupted", file=sys.stderr)
                    sys.exit(INTERRUPTED)
                # Hydra's only ValueError on the way to main() is for group=null; main's own errors are not mistakes.
                composing = isinstance(error, ValueError) and "Config group override" in str(error)
                if os.environ.get(TRACEBACK) != "1" and (isinstance(error, MISTAKES) or composing):
                    sys.exit(report(error))
                raise

        return wrapped

    return decorate
