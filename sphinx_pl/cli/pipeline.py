"""`sphinx-pipeline [COMMAND] [override ...] [STEP:override ...]` runs a whole
recipe, step by step.

    run      (or no command) run the steps that are not done; with launcher=slurm submit them
    status   show the state; exit code 1 if something failed
    cancel   cancel the pipeline's jobs in SLURM's queue

    experiment=demo                 the recipe: conf/pipeline/experiment/
    launcher=slurm                  conf/pipeline/launcher/; its keys too: launcher.partition=gpu
    finetune:stage.optim.lr=1e-5    an override for one step
    train:trainer.devices=8         for all steps of a script (train, mix_weights, evaluate); all:... for every script
    finetune:launcher.time=8:00:00  the launcher's keys for one step
    redo=finetune keep=mix          repeat a step that is done; keep a step whose configuration changed
    dry=true                        only print the commands

docs/pipeline.md explains more.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from sphinx_pl.pipeline import local, slurm, status
from sphinx_pl.pipeline.recipe import check_closely, compose_pipeline, load, split
from sphinx_pl.pipeline.state import State
from sphinx_pl.runtime.hydra_app import TRACEBACK, report
from sphinx_pl.runtime.overrides import MISTAKES
from sphinx_pl.utils.errors import UserError, suggest


def run(arguments: Sequence[str]) -> int:
    """Run or submit the steps that are not done."""
    # The status line appears only on a terminal.
    with Console(stderr=True).status("composing and checking the configuration of every step"):
        recipe = load(arguments)
        # The shipped recipes are tested. A changed recipe, or one that runs for days, deserves a
        # closer check.
        if arguments or recipe.launcher != "local":
            check_closely(recipe)
    if recipe.dry:
        return local.dry_run(recipe)
    if recipe.launcher == "slurm":
        return slurm.submit(recipe)
    slurm.check_none_queued(State(recipe.folder))
    command = [argument for argument in arguments if not argument.startswith(("redo=", "keep="))]
    return local.run(recipe, shlex.join(["sphinx-pipeline", *command]))


def show(arguments: Sequence[str]) -> int:
    """Print the table of steps. Return 1 if something failed."""
    state = _state(arguments)
    lines = status.look(state)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(status.table(lines, str(state.folder.parent)))
    return int(any(line.state in status.BAD for line in lines))


def cancel(arguments: Sequence[str]) -> int:
    """Cancel the pipeline's jobs."""
    print(f"{slurm.cancel(_state(arguments))} jobs cancelled")
    return 0


def begin(arguments: Sequence[str]) -> int:
    """Begin a step inside its job (FOLDER STEP), if the steps that it needs are done."""
    folder, name = arguments
    slurm.begin(State(Path(folder)), name)
    return 0


def end(arguments: Sequence[str]) -> int:
    """Record the end of a step inside its job (FOLDER STEP CODE)."""
    folder, name, code = arguments
    record = State(Path(folder)).end(name, int(code))
    if record.state != "done" and int(code) == 0:
        raise UserError(f"step {name} ended well but did not write {record.product}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run,
    "status": show,
    "cancel": cancel,
    "begin": begin,
    "end": end,
}


def _state(arguments: Sequence[str]) -> State:
    return State(Path(compose_pipeline(split(arguments)[0]).output_dir) / "pipeline")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of the command, or 2 after a line that names the mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    command = COMMANDS[words.pop(0) if words and words[0] in COMMANDS else "run"]
    try:
        if unknown := [word for word in words[:1] if "=" not in word and command is run]:
            raise UserError(f"unknown command '{unknown[0]}': {suggest(unknown[0], ('run', 'status', 'cancel'))}")
        return command(words)
    except MISTAKES as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
