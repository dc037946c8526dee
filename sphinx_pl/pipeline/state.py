"""What is known of each step, in one small file a step, and what follows from it: done, to be run, why.

A file a step, because the jobs of a cluster write them at the same time: NAME.json (`Record`), NAME.yaml (the step's
configuration at its last attempt), NAME.log, NAME.sh (its job), NAME.failed (its script has failed), all in
`<output_dir>/pipeline`.
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
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import hash_file, write_whole

_TOLD_TO_GO = (128 + signal.SIGINT, *(128 + number for number in SIGNALS))
"""Exit codes after a signal at which a run saves what it has, such as that before SLURM's time limit."""


@dataclass
class Record:
    """Of one step.

    Attributes:
        state: waiting (to begin), running, done, failed or interrupted. A step that was killed still says `running`.
        command: its last one.
        identity: of its configuration (`Step.identity`).
        product: the file that says what was made, and its SHA-256 once the step is done.
        folder: of a training run, whose checkpoints are dropped where the step is made anew.
        needs: the steps before it; `inputs`: SHA-256 of what they had made when this step began.
        redo: begin anew, whatever is there.
        launcher: where it runs; `job`: the SLURM job, `depends`: those that it waits for.
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
    """The time as it is stored: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class State:
    """The records in `folder`, which is `<output_dir>/pipeline`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def failure(self, name: str) -> Path:
        """A file that the step's script makes when it fails, see `cli.note_failure`."""
        return self.folder / f"{name}.failed"

    def names(self) -> list[str]:
        """Of all steps with a record, in the order in which they were planned last."""
        known = {path.stem for path in self.folder.glob("*.json")}
        file = self.folder / "steps"
        order = file.read_text(encoding="utf-8").split() if file.is_file() else []
        return [name for name in order if name in known]

    def read(self, name: str) -> Record | None:
        """
        Raises:
            UserError: the file is damaged.
        """
        path = self.folder / f"{name}.json"
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): delete it and take what the step has made with keep={name}"
            ) from None

    def write(self, record: Record, **changes: Any) -> Record:
        """Store the record with these changes; returns it."""
        record = dataclasses.replace(record, **changes)
        text = json.dumps(dataclasses.asdict(record), indent=2) + "\n"
        write_whole(self.folder / f"{record.name}.json", text)
        return record

    def plan(self, step: Step, record: Record | None, **changes: Any) -> Record:
        """Write down what is about to run, over what is known of earlier attempts."""
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

    def empty(self, step: Step) -> Record:
        folder = None if step.folder is None else str(step.folder)
        return Record(
            step.name, "waiting", list(step.command), step.identity, str(step.product), folder, list(step.needs)
        )

    def inputs(self, needs: Mapping[str, Any] | list[str] | tuple[str, ...]) -> dict[str, str]:
        """SHA-256 of what each of these steps has made; those that are not done are missing."""
        found = {}
        for name in needs:
            record = self.read(name)
            if record is not None and is_done(record):
                assert record.made is not None
                found[name] = record.made
        return found

    def begin(self, name: str, **changes: Any) -> Record:
        """A step starts: drop what it is not to go on from, and say that it runs.

        Raises:
            UserError: a step that it needs is not done, or there is no such step.
        """
        record = self.read(name)
        if record is None:
            raise UserError(f"{self.folder} knows no step '{name}'")
        inputs = self.inputs(record.needs)
        if missing := [need for need in record.needs if need not in inputs]:
            raise UserError(f"step {name} needs {', '.join(missing)}, which is not done")
        if record.redo or (record.inputs is not None and record.inputs != inputs):
            drop(record)
        self.failure(name).unlink(missing_ok=True)
        started = {"state": "running", "started": now(), "ended": None, "exit": None, "host": socket.gethostname()}
        return self.write(record, **started, made=None, inputs=inputs, redo=False, **changes)

    def end(self, name: str, code: int, interrupted: bool = False) -> Record:
        """A step has ended with this exit code; it is done if that is 0 and what it makes is there."""
        record = self.read(name)
        assert record is not None
        product = Path(record.product)
        if interrupted or (code in _TOLD_TO_GO and not self.failure(name).exists()):
            state = "interrupted"
        else:
            state = "done" if code == 0 and product.is_file() else "failed"
        made = hash_file(product) if state == "done" else None
        return self.write(record, state=state, exit=code, ended=now(), made=made)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Only one pipeline at a time in this folder; yields the lock's descriptor.

        A step's process inherits it. So the lock lasts as long as anything runs, and no longer, whoever was killed.

        Raises:
            UserError: another one holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{self.folder.parent}: a pipeline runs here already ({holder}, or a step that outlived it): wait "
                    "for it or stop it"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now()}".encode(), 0)
            yield descriptor
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        """Whether a pipeline, or a step of one, runs on this folder by the local launcher."""
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


def is_done(record: Record) -> bool:
    """Ended well, and what it made is there as it was then."""
    product = Path(record.product)
    return record.state == "done" and product.is_file() and hash_file(product) == record.made


def drop(record: Record) -> None:
    """Make the next training run in the folder a new one, in spite of `ckpt_path=last`. Other scripts replace theirs.

    What is there stays until that run has saved something.
    """
    if record.folder is not None and Path(record.folder).is_dir():
        (Path(record.folder) / AGAIN).touch()


@dataclass(frozen=True)
class Decision:
    """Whether a step has to run, why (or why not), and whether it is to begin anew."""

    run: bool
    why: str
    redo: bool = False


def decide(recipe: Recipe, state: State) -> dict[str, Decision]:
    """What is to be done for each step, in order. Only reads.

    Raises:
        UserError: a finished step was made with another configuration, or not by the pipeline.
    """
    decisions: dict[str, Decision] = {}
    for step in recipe.steps.values():
        record = state.read(step.name)
        decisions[step.name] = _decide(recipe, state, step, record, decisions)
    return decisions


def _decide(
    recipe: Recipe, state: State, step: Step, record: Record | None, before: Mapping[str, Decision]
) -> Decision:
    if step.name in recipe.redo or (record is not None and record.redo):
        return Decision(True, "to be made anew", redo=True)
    # A step that always runs is expected to find nothing to do.
    renewed = [need for need in step.needs if before[need].run and not recipe.steps[need].always]
    kept = step.name in recipe.keep
    if record is None or record.inputs is None or (record.state == "done" and not is_done(record)):
        return _decide_unknown(step, record, kept)
    if record.state != "done":
        change = "" if record.identity == step.identity else f", now with {changes(state, step)}"
        if not _same_inputs(state, step, record, renewed):
            return Decision(True, "is begun anew, since what it needs was made anew")
        return Decision(True, f"{record.state} before: goes on from what is there{change}")
    if step.always:
        return Decision(True, "looks whether there is anything to do")
    if kept:
        return Decision(False, "kept")
    if record.identity != step.identity:
        raise UserError(
            f"step {step.name} was done with another configuration ({changes(state, step)}): redo={step.name} makes it "
            f"anew, keep={step.name} takes it as it is"
        )
    if renewed:
        return Decision(True, f"stale: {', '.join(renewed)} will be made anew")
    if not _same_inputs(state, step, record, []):
        return Decision(True, "stale: what it needs was made anew after it")
    return Decision(False, "done")


def _decide_unknown(step: Step, record: Record | None, kept: bool) -> Decision:
    """A step that the pipeline has never begun, or whose product is not the one that it made."""
    left = step.product.is_file() or (step.folder is not None and (step.folder / "checkpoints").exists())
    if record is not None and record.state == "done" and not step.product.is_file():
        return Decision(True, "what it made is gone")
    if not left or step.always:
        return Decision(True, "not started")
    if not kept:
        where = step.folder or step.product.parent
        raise UserError(
            f"step {step.name}: {where} was not made by this pipeline: keep={step.name} takes it as it is, "
            f"redo={step.name} makes it anew"
        )
    return Decision(
        not step.product.is_file(), "kept" if step.product.is_file() else "kept: goes on from what is there"
    )


def _same_inputs(state: State, step: Step, record: Record, renewed: list[str]) -> bool:
    """Whether what the step was made from is still there. A need that is left out by now does not count."""
    current = state.inputs(step.needs)
    old = record.inputs or {}
    return not renewed and all(old.get(need) == current.get(need) for need in step.needs if need in current)


def adopt(recipe: Recipe, state: State) -> None:
    """Steps named in `keep` count as made with today's configuration from today's inputs; `redo` is remembered."""
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
    """`key: old -> new` of the first differences between a step's configuration and that of its last attempt."""
    path = state.folder / f"{step.name}.yaml"
    if not path.is_file():
        return "its configuration was not kept"
    old, new = (_flat(OmegaConf.to_container(OmegaConf.create(text))) for text in (path.read_text(), step.config))
    none = "nothing"
    found = [
        f"{key}: {old.get(key, none)} -> {new.get(key, none)}"
        for key in sorted({*old, *new}, key=lambda key: (key.count("."), key))  # what says most first, such as name
        if old.get(key, none) != new.get(key, none)
    ]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
