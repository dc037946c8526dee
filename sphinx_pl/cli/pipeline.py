"""`sphinx-pipeline [COMMAND] [override ...] [STEP:override ...]`: a whole recipe, step after step.

    run      (or no command) run what is not done; with launcher=slurm submit it
    status   where it is; exit code 1 if something failed
    cancel   cancel its jobs in SLURM's queue

    experiment=demo                 the recipe: conf/pipeline/experiment/
    launcher=slurm                  conf/pipeline/launcher/; its keys too: launcher.partition=gpu
    finetune:stage.optim.lr=1e-5    an override for one step
    train:trainer.devices=8         for all steps of a script (train, mix_weights, evaluate); all:... for every script
    finetune:launcher.time=8:00:00  the launcher's keys for one step
    redo=finetune keep=mix          make anew although done; take as it is although changed
    dry=true                        print the commands only

docs/pipeline.md says more.
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
from sphinx_pl.runtime.hydra_app import MISTAKES, TRACEBACK, report
from sphinx_pl.utils.errors import UserError, suggest


def run(arguments: Sequence[str]) -> int:
    """Run or submit what is not done."""
    with Console(stderr=True).status("composing and checking the configuration of every step"):  # on a terminal only
        recipe = load(arguments)
        # The shipped recipes are tested; what a user changed, and what will run for days, is worth the seconds.
        if arguments or recipe.launcher != "local":
            check_closely(recipe)
    if recipe.dry:
        return local.dry_run(recipe)
    if recipe.launcher == "slurm":
        return slurm.submit(recipe)
    slurm.check_none_queued(State(recipe.folder))
    again = [argument for argument in arguments if not argument.startswith(("redo=", "keep="))]
    return local.run(recipe, shlex.join(["sphinx-pipeline", *again]))


def show(arguments: Sequence[str]) -> int:
    """Print the table; 1 if something failed."""
    state = _state(arguments)
    lines = status.look(state)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(status.table(lines, str(state.folder.parent)))
    return int(any(line.state in status.BAD for line in lines))


def cancel(arguments: Sequence[str]) -> int:
    """Cancel jobs."""
    print(f"{slurm.cancel(_state(arguments))} jobs cancelled")
    return 0


def begin(arguments: Sequence[str]) -> int:
    """In a job: FOLDER STEP. The step begins, if what it needs is done."""
    folder, name = arguments
    slurm.begin(State(Path(folder)), name)
    return 0


def end(arguments: Sequence[str]) -> int:
    """In a job: FOLDER STEP CODE. The step has ended."""
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
    """Exit status of the command, or 2 with one line that says what is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    command = COMMANDS[given.pop(0) if given and given[0] in COMMANDS else "run"]
    try:
        if words := [word for word in given[:1] if "=" not in word and command is run]:
            raise UserError(f"unknown command '{words[0]}': {suggest(words[0], ('run', 'status', 'cancel'))}")
        return command(given)
    except MISTAKES as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
