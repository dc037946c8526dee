"""The entry scripts: Hydra's `main`, with one-line answers to mistakes."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from sphinx_pl.runtime.command_line import as_typed, refuse_options
from sphinx_pl.runtime.overrides import MISTAKES, check_packages, explain_choice, explain_override, one_line
from sphinx_pl.runtime.ranks import first_process
from sphinx_pl.runtime.resolvers import register_resolvers
from sphinx_pl.utils.config import CONFIG_FOLDER
from sphinx_pl.utils.errors import UserError

TRACEBACK = "SPHINX_TRACEBACK"
FAILED = "SPHINX_STEP_FAILED"
INTERRUPTED = 128 + signal.SIGINT
"""The exit code of an interrupted command, as in a shell."""
INSTALLED = {"train": "sphinx-train", "mix_weights": "sphinx-mix", "evaluate": "sphinx-evaluate", "chat": "sphinx-chat"}
"""The command that an installation has for each script of the repository."""


def is_here(script: str) -> bool:
    """Whether the working folder is the repository, so that `python train.py` runs this code."""
    file = Path(f"{script}.py")
    return file.is_file() and file.resolve() == CONFIG_FOLDER.parent.parent / file


def command_of(script: str) -> str:
    """`python train.py` in the repository, the installed command `sphinx-train` elsewhere."""
    return f"python {script}.py" if is_here(script) else INSTALLED[script]


def report(error: BaseException) -> int:
    """Print the error as one line on stderr, and return the exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


def note_failure(error: BaseException) -> None:
    """Make the file that `SPHINX_STEP_FAILED` names, if the error is a failure and neither a signal
    nor a normal exit.

    If a task fails and srun ends the other tasks (`--kill-on-bad-exit`), srun itself reports
    SIGTERM.
    """
    code = error.code if isinstance(error, SystemExit) else 1
    fails = not isinstance(error, KeyboardInterrupt) and (0 < code < 128 if isinstance(code, int) else code is not None)
    if (file := os.environ.get(FAILED)) and fails:
        with contextlib.suppress(OSError):
            Path(file).touch()


def entry_point(
    config_name: str,
    check: Callable[[DictConfig], Any] | None = None,
    arguments: Callable[[Sequence[str]], Sequence[str]] = list,
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Return a decorator that runs `hydra.main` on `conf/<config_name>.yaml`.

    Errors that a user can cause end in one line and exit code 2. With the environment variable
    SPHINX_TRACEBACK=1 they end in a traceback.

    Args:
        check: raises a `UserError` for a configuration that the script does not accept.
        arguments: changes the command line before Hydra reads it.
    """
    register_resolvers()

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        started = False

        @functools.wraps(main)
        def guarded(cfg: DictConfig) -> Any:
            nonlocal started
            started = True
            # Mistakes are caught here, before Hydra adds lines to them.
            try:
                check_packages(HydraConfig.get())
                if check is not None:
                    check(cfg)
                return main(cfg)
            except MISTAKES as error:
                if os.environ.get(TRACEBACK) == "1":
                    raise
                sys.exit(report(error))

        run = hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=config_name)(guarded)

        @functools.wraps(main)
        def wrapped() -> Any:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so Hydra raises its errors
            gc.freeze()  # Imported objects stay alive, so no collection needs to search them.
            try:
                sys.argv[1:] = as_typed(config_name, arguments(sys.argv[1:]))
                refuse_options(sys.argv[1:])
                if not first_process():  # Only the first process writes to the run folder.
                    sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=other_ranks"]
                return run()
            except BaseException as error:
                note_failure(error)
                options = get_args_parser().parse_known_args(sys.argv[1:])[0]
                overrides = list(options.overrides)
                if options.config_dir:  # explaining a mistake composes without the command line's options
                    overrides.append(f"hydra.searchpath=[file://{Path(options.config_dir).absolute()}]")
                if isinstance(error, HydraException) and os.environ.get(TRACEBACK) != "1":
                    try:
                        error = explain_override(error, CONFIG_FOLDER, config_name, overrides, check) or error
                    except UserError as other:
                        error = other
                # Hydra makes the run folder before the script starts.
                if isinstance(error, OSError) and not isinstance(error, MISTAKES) and not started:
                    error = UserError(
                        f"the folder '{error.filename}' cannot be made ({error.strerror}): choose another one with "
                        f"{'output_dir' if config_name == 'train' else 'hydra.run.dir'}=FOLDER"
                    )
                if isinstance(error, KeyboardInterrupt) and os.environ.get(TRACEBACK) != "1":
                    print("interrupted", file=sys.stderr)
                    sys.exit(INTERRUPTED)
                # Before main() starts, Hydra raises ValueError only for group=null. A ValueError of
                # main itself is no mistake of the user.
                if isinstance(error, ValueError) and "Config group override" in str(error):
                    error = explain_choice(error, CONFIG_FOLDER, overrides)
                if os.environ.get(TRACEBACK) != "1" and isinstance(error, MISTAKES):
                    sys.exit(report(error))
                raise

        return wrapped

    return decorate
