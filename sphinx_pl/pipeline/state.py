"""Keeps a small file for each step, and decides from these files whether a step is done or must
run.

There is a file per step because the jobs of a cluster write them at the same time: NAME.json
(`StepRecord`), NAME.yaml (the configuration of the last attempt), NAME.log, NAME.sh (its job) and
NAME.failed (its script failed), all in `<output_dir>/pipeline`.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sphinx_pl.pipeline.recipe import Recipe, Step
from sphinx_pl.runtime.run_folder import AGAIN
from sphinx_pl.runtime.signals import SIGNALS
from sphinx_pl.utils.config import leaves
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import hash_file, write_whole

_SIGNALLED = (128 + signal.SIGINT, *(128 + number for number in SIGNALS))
"""Exit codes after a signal that lets a run save, such as the one before SLURM's time limit."""


@dataclass
class StepRecord:
    """The record of one step.

    Attributes:
        state: waiting, running, done, failed or interrupted. A killed step still says `running`.
        command: its last command.
        identity: the identity of its configuration (`Step.identity`).
        product: the file that the step writes at its end.
        made: the SHA-256 of the product once the step is done.
        folder: the folder of a training run, which starts from scratch if the step is repeated.
        needs: the steps before it.
        inputs: the SHA-256 of their products when this step began.
        redo: whether the step starts from scratch next time.
        launcher: where it runs.
        job: the SLURM job.
        depends: the SLURM jobs that it waits for.
    """

    name: str
    state: str
    command: list[str]
    identity: str
    product: str
    folder: str | None
    needs: list[str]
    made: str | None = None
    inputs: dict[str, str] | None = None
    redo: bool = False
    launcher: str = "local"
    job: str | None = None
    depends: list[str] = field(default_factory=list)
    host: str | None = None
    submitted: str | None = None
    started: str | None = None
    ended: str | None = None
    exit: int | None = None


def now() -> str:
    """Return the current time as it is stored: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class State:
    """The records in `folder`, which is `<output_dir>/pipeline`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def failure(self, name: str) -> Path:
        """Return the path of a file that the step's script makes when it fails.

        See `hydra_app.note_failure`.
        """
        return self.folder / f"{name}.failed"

    def names(self) -> list[str]:
        """Return all steps with a record, in the order in which they were last planned."""
        recorded = {path.stem for path in self.folder.glob("*.json")}
        file = self.folder / "steps"
        order = file.read_text(encoding="utf-8").split() if file.is_file() else []
        return [name for name in order if name in recorded]

    def read(self, name: str) -> StepRecord | None:
        """Return the record of a step, or None.

        Raises:
            UserError: the file is damaged.
        """
        path = self.folder / f"{name}.json"
        try:
            return StepRecord(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): delete it and keep the step's product with keep={name}"
            ) from None

    def write(self, record: StepRecord, **changes: Any) -> StepRecord:
        """Store the record with these changes and return it."""
        record = dataclasses.replace(record, **changes)
        text = json.dumps(dataclasses.asdict(record), indent=2) + "\n"
        write_whole(self.folder / f"{record.name}.json", text)
        return record

    def plan(self, step: Step, record: StepRecord | None, **changes: Any) -> StepRecord:
        """Record what is about to run, over the record of earlier attempts."""
        record = record or self.empty(step)
        write_whole(self.folder / f"{step.name}.yaml", step.config)
        return self.write(
            record,
            command=list(step.command),
            identity=step.identity,
            product=str(step.product),
            folder=None if step.folder is None else str(step.folder),
            needs=list(step.needs),
            **changes,
        )

    def empty(self, step: Step) -> StepRecord:
        folder = None if step.folder is None else str(step.folder)
        return StepRecord(
            step.name, "waiting", list(step.command), step.identity, str(step.product), folder, list(step.needs)
        )

    def inputs(self, needs: Mapping[str, Any] | list[str] | tuple[str, ...]) -> dict[str, str]:
        """Return the SHA-256 of the products of these steps.

        Steps that are not done are missing.
        """
        products = {}
        for name in needs:
            record = self.read(name)
            if record is not None and is_done(record):
                assert record.made is not None
                products[name] = record.made
        return products

    def begin(self, name: str, **changes: Any) -> StepRecord:
        """Record that a step starts, and let it start from scratch if it must not resume.

        Raises:
            UserError: a step that it needs is not done, or there is no such step.
        """
        record = self.read(name)
        if record is None:
            raise UserError(f"{self.folder} has no step '{name}'")
        inputs = self.inputs(record.needs)
        if missing := [need for need in record.needs if need not in inputs]:
            raise UserError(f"step {name} needs {', '.join(missing)}, which is not done")
        if record.redo or (record.inputs is not None and record.inputs != inputs):
            drop(record)
        self.failure(name).unlink(missing_ok=True)
        fields = {"state": "running", "started": now(), "ended": None, "exit": None, "host": socket.gethostname()}
        return self.write(record, **fields, made=None, inputs=inputs, redo=False, **changes)

    def end(self, name: str, code: int, interrupted: bool = False) -> StepRecord:
        """Record that a step ended with this exit code.

        It is done if the code is 0 and its product exists.
        """
        record = self.read(name)
        assert record is not None
        product = Path(record.product)
        if interrupted or (code in _SIGNALLED and not self.failure(name).exists()):
            state = "interrupted"
        else:
            state = "done" if code == 0 and product.is_file() else "failed"
        made = hash_file(product) if state == "done" else None
        return self.write(record, state=state, exit=code, ended=now(), made=made)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Allow only one pipeline at a time in this folder, and yield the lock's descriptor.

        A step's process inherits it. So the lock lasts exactly as long as any process runs,
        whichever was killed.

        Raises:
            UserError: another pipeline holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{self.folder.parent}: a pipeline already runs here ({holder}, or a step that outlived it): wait "
                    "for it or stop it"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now()}".encode(), 0)
            yield descriptor
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        """Return whether the local launcher runs a pipeline, or a step of one, in this folder."""
        try:
            descriptor = os.open(self.folder / "lock", os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def is_done(record: StepRecord) -> bool:
    """Return whether the step ended successfully and its product is unchanged."""
    product = Path(record.product)
    return record.state == "done" and product.is_file() and hash_file(product) == record.made


def drop(record: StepRecord) -> None:
    """Make the next training run in the folder start from scratch, in spite of `ckpt_path=last`.

    Other scripts overwrite their products anyway. The files stay until that run has saved
    something.
    """
    if record.folder is not None and Path(record.folder).is_dir():
        (Path(record.folder) / AGAIN).touch()


@dataclass(frozen=True)
class Decision:
    """Whether a step must run, why (or why not), and whether it starts from scratch."""

    run: bool
    why: str
    redo: bool = False


def decide(recipe: Recipe, state: State) -> dict[str, Decision]:
    """Return a decision for each step, in order. Nothing is written.

    Raises:
        UserError: a finished step had another configuration, or the pipeline did not make its
            product.
    """
    decisions: dict[str, Decision] = {}
    for step in recipe.steps.values():
        record = state.read(step.name)
        decisions[step.name] = _decide(recipe, state, step, record, decisions)
    return decisions


def _decide(
    recipe: Recipe, state: State, step: Step, record: StepRecord | None, before: Mapping[str, Decision]
) -> Decision:
    if step.name in recipe.redo or (record is not None and record.redo):
        return Decision(True, "repeated by redo", redo=True)
    # A step that always runs usually finds no work to do.
    repeats = [need for need in step.needs if before[need].run and not recipe.steps[need].always]
    kept = step.name in recipe.keep
    if record is None or record.inputs is None or (record.state == "done" and not is_done(record)):
        return _decide_unknown(step, record, kept)
    if record.state != "done":
        change = "" if record.identity == step.identity else f", now with {changes(state, step)}"
        if not _same_inputs(state, step, record, repeats):
            return Decision(True, "starts from scratch, because a step that it needs was repeated")
        return Decision(True, f"{record.state} before: resumes{change}")
    if step.always:
        return Decision(True, "checks whether there is work to do")
    if kept:
        return Decision(False, "kept")
    if record.identity != step.identity:
        raise UserError(
            f"step {step.name} was done with another configuration ({changes(state, step)}): redo={step.name} "
            f"repeats it, keep={step.name} keeps it as it is"
        )
    if repeats:
        return Decision(True, f"stale: {', '.join(repeats)} will be repeated")
    if not _same_inputs(state, step, record, []):
        return Decision(True, "stale: a step that it needs was repeated later")
    return Decision(False, "done")


def _decide_unknown(step: Step, record: StepRecord | None, kept: bool) -> Decision:
    """Decide for a step that the pipeline never began, or whose product it did not make."""
    has_files = step.product.is_file() or (step.folder is not None and (step.folder / "checkpoints").exists())
    if record is not None and record.state == "done" and not step.product.is_file():
        return Decision(True, "its product is missing")
    if not has_files or step.always:
        return Decision(True, "not started")
    if not kept:
        where = step.folder or step.product.parent
        raise UserError(
            f"step {step.name}: this pipeline did not make {where}: keep={step.name} keeps it as it is, "
            f"redo={step.name} repeats the step"
        )
    return Decision(not step.product.is_file(), "kept" if step.product.is_file() else "kept: resumes")


def _same_inputs(state: State, step: Step, record: StepRecord, renewed: list[str]) -> bool:
    """Return whether the step's inputs are unchanged. A need that is omitted now does not count."""
    current = state.inputs(step.needs)
    old = record.inputs or {}
    return not renewed and all(old.get(need) == current.get(need) for need in step.needs if need in current)


def adopt(recipe: Recipe, state: State) -> None:
    """Record the `keep` steps as made from today's configuration and inputs, and `redo`."""
    write_whole(state.folder / "steps", "".join(f"{name}\n" for name in recipe.steps))
    for step in recipe.steps.values():
        record = state.read(step.name)
        if step.name in recipe.redo:
            state.write(record or state.empty(step), redo=True)
        if step.name not in recipe.keep:
            continue
        inputs = state.inputs(step.needs)
        if step.product.is_file() and (record is None or record.state == "done" or record.inputs is None):
            made = hash_file(step.product)
            state.plan(step, record, state="done", made=made, inputs=inputs, exit=0, redo=False)
        else:
            state.plan(step, record, state="interrupted", inputs=inputs, redo=False)


def changes(state: State, step: Step, most: int = 3) -> str:
    """`key: old -> new` for the first differences to the configuration of the last attempt."""
    path = state.folder / f"{step.name}.yaml"
    if not path.is_file():
        return "its configuration was not kept"
    old, new = (
        dict(leaves(OmegaConf.to_container(OmegaConf.create(text)))) for text in (path.read_text(), step.config)
    )
    none = "nothing"
    differences = [
        f"{key}: {old.get(key, none)} -> {new.get(key, none)}"
        # short keys, such as name, come first
        for key in sorted({*old, *new}, key=lambda key: (key.count("."), key))
        if old.get(key, none) != new.get(key, none)
    ]
    more = f" and {len(differences) - most} more" if len(differences) > most else ""
    return ", ".join(differences[:most]) + more
