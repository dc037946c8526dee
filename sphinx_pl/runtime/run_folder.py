"""The folder of a training run: who writes to it, and what an earlier run left in it.

A run first moves aside what it replaces. The earlier files are deleted when the run has saved a
checkpoint or a model, and they come back if it ends before that:

    .replaced/             what the run replaces or rewrites, and state.json, which says from which step on
    checkpoints/.replaced/ the checkpoints that it replaces; predictions/.replaced/ likewise
    model-before/          the earlier model, from the first new checkpoint on until the new model is complete
    run.lock               the process that writes to the folder

Each transition is one rename or one written file, so a kill at any moment leaves a state that
`RunFolder.settle` completes or takes back.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sphinx_pl.runtime import slurm
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import discard, replaced, write_whole

LOCK = "run.lock"
ASIDE = ".replaced"
BEFORE = "model-before"
AGAIN = ".redo"
"""A file whose presence makes the next run replace what is there, as overwrite=true does."""

_STATE = "state.json"
_REWRITTEN = (
    "config.yaml",
    "environment.json",
    "metrics.csv",
    "hparams.yaml",
    ".hydra",
    "tensorboard",
    "slurm_job",
    "wandb_id",
)
_BY_STEP = {
    "": re.compile(r"model-step-(\d+)"),
    "checkpoints": re.compile(r"step-(\d+)"),
    "predictions": re.compile(r"step-(\d+)\.\w+"),
}
"""Folder -> names of what is written in it at a step."""


# --- who writes to it


@dataclass(frozen=True)
class Holder:
    """The process that holds a run folder.

    `machine` and `boot` tell hosts of one name and boots of one host apart, `space` is the space of
    process ids. `start` is the clock tick at which the process started, since ids are used again.
    """

    host: str
    pid: int
    machine: str = ""
    boot: str = ""
    space: str = ""
    start: str = ""
    job: str | None = None
    restarts: int = 0
    cluster: str | None = None
    since: str = ""

    @classmethod
    def this(cls) -> Holder:
        pid = os.getpid()
        return cls(
            socket.gethostname(),
            pid,
            _text(Path("/etc/machine-id")),
            _text(Path("/proc/sys/kernel/random/boot_id")),
            _space(),
            _start_of(pid),
            slurm.job(),
            slurm.restarts(),
            os.environ.get("SLURM_CLUSTER_NAME"),
            datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """None if the file does not name a process."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**content)
        except (ValueError, TypeError):
            return None

    def ended(self) -> bool | None:
        """Whether the process has ended, or None where this host cannot know it."""
        here = Holder.this()
        same = self.host == here.host and self.machine == here.machine
        if same and self.machine and self.boot != here.boot:
            return True
        if same and (self.boot, self.space) == (here.boot, here.space):
            return _start_of(self.pid) != self.start if self.start else not _exists(self.pid)
        if self.job is None or (self.cluster and here.cluster and self.cluster != here.cluster):
            return None
        if self.job == here.job and self.restarts < here.restarts:
            return True  # SLURM ends a job before it starts it again
        return slurm.ended(self.job)

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no file that a Path could name
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """The clock tick at which a process started; "" if it has ended, or without /proc."""
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


# --- what it holds


class RunLog(logging.FileHandler):
    """The file of a run's messages.

    It keeps them in memory until the run starts, so that a refused command changes no file.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(filename, delay=True, encoding="utf-8")
        self._kept: list[logging.LogRecord] | None = []
        self._before: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._kept is None:
            super().emit(record)
        else:
            self._kept.append(record)

    def start(self) -> None:
        """Write what was kept, and from now on every message at once."""
        if self._kept is None:
            return
        path = Path(self.baseFilename)
        self._before = path.stat().st_size if path.is_file() else None
        kept, self._kept = self._kept, None
        for record in kept:
            self.handle(record)

    def undo(self) -> None:
        """Make the file what it was before `start`."""
        if self._kept is not None:
            return
        self.close()
        self._kept = []
        path = Path(self.baseFilename)
        if self._before is None:
            path.unlink(missing_ok=True)
        elif path.is_file():
            os.truncate(path, self._before)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A full disk ends the run where something is saved; a traceback for each message helps nobody."""


def run_logs() -> list[RunLog]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, RunLog)]


class RunFolder:
    """A run's folder, from the start of a run to its end. Only the run's first process calls it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.came_back = False
        """Whether SLURM has started this job again, which had begun to write to it."""
        self._held = ""
        self._mutex = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether this process has the lock."""
        return bool(self._held)

    # -- the lock ---------------------------------------------------------------------------------------------------

    @property
    def lock(self) -> Path:
        return self.path / LOCK

    def enter(self) -> None:
        """Take the folder's lock.

        Raises:
            UserError: another run holds it, or one that this host cannot ask about, or nothing can be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        content = json.dumps(asdict(Holder.this())) + "\n"
        for _ in range(3):
            if self._create(content):
                self._held = content
                return
            self._remove_stale()
        raise UserError(f"{self.path}: other runs start in this folder at the same time: start this one again")

    def _create(self, content: str) -> bool:
        """Make the lock with its content; False if there is one."""
        own = self.path / f".{LOCK}.{socket.gethostname()}-{os.getpid()}"
        try:
            own.write_text(content, encoding="utf-8")
            try:
                os.link(own, self.lock)  # the name and its content appear together, on network disks too
            except FileExistsError:
                return False
            except OSError:  # a disk without hard links
                try:
                    descriptor = os.open(self.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                except FileExistsError:
                    return False
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(content)
            return True
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            with suppress(OSError):  # on a disk that cannot be written it is an error to delete what is not there
                own.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: a run cannot write to this folder ({error.strerror or error}): choose another output_dir"
        )

    def _remove_stale(self) -> None:
        """Remove the lock of a process that has ended.

        Raises:
            UserError: it has not ended, or this host cannot know it.
        """
        try:
            found = self.lock.read_text(encoding="utf-8", errors="replace")
            holder = Holder.read(self.lock)
        except FileNotFoundError:
            return
        ended = holder.ended() if holder is not None else None
        who = str(holder) if holder is not None else "a process that the lock does not name"
        if ended is False:
            raise UserError(
                f"{self.path} is in use by {who}: wait for that run or stop it, choose another folder with run=NAME, "
                f"or, if this is a copy of its folder, delete {self.lock}"
            )
        if ended is None:
            raise UserError(
                f"{self.path} is in use by {who}; this host cannot tell whether that run has ended: if it has, delete "
                f"{self.lock}, else wait for it or choose another folder with run=NAME"
            )
        # By a rename, so that of two processes that find it stale only one takes it over.
        taken = self.path / f".{LOCK}.stale-{socket.gethostname()}-{os.getpid()}"
        with suppress(FileNotFoundError):
            self.lock.rename(taken)
            if taken.read_text(encoding="utf-8") != found:  # another process was faster: this one is its lock
                with suppress(OSError):
                    os.link(taken, self.lock)
            taken.unlink()

    def leave(self) -> None:
        """Give the lock back. Does nothing in a process that does not hold it."""
        if self._held and json.loads(self._held)["pid"] == os.getpid():
            with suppress(OSError):
                if self.lock.read_text(encoding="utf-8") == self._held:
                    self.lock.unlink()
            with suppress(OSError):
                self.path.rmdir()  # nothing was written to it
        self._held = ""

    # -- what a run replaces ----------------------------------------------------------------------------------------

    def replaced_by(self, after: int) -> list[Path]:
        """What a run replaces that resumes after `after` optimizer steps (-1: a new run). The newest comes first."""
        found: list[tuple[int, Path]] = []
        for folder, names in _BY_STEP.items():
            with suppress(OSError):
                for path in (self.path / folder).iterdir():
                    if (match := names.fullmatch(path.name)) and int(match[1]) > after:
                        found.append((int(match[1]), path))
        model = self.path / "model"
        return [*([model] if _there(model) else []), *(path for _, path in sorted(found, reverse=True))]

    def replace(self, after: int, keep: Collection[str] = ()) -> None:
        """Move aside what this run replaces, and copy what it continues and rewrites. Call `settle` before.

        Args:
            after: see `replaced_by`.
            keep: names of files that a new run continues as well.
        """
        moved = self.replaced_by(after)
        rewritten = [path for name in _REWRITTEN if (path := self.path / name).exists()]
        if not moved and not rewritten:
            return
        try:
            self._write_state(after, complete=False)
            for path in rewritten:
                if after < 0 and path.name not in keep:
                    moved.append(path)
                else:
                    _copy(path, _aside(path))
            for path in moved:
                _aside(path).parent.mkdir(exist_ok=True)
                path.rename(_aside(path))
            self._write_state(after, complete=True)
        except OSError:
            self._take_back()
            raise

    def saved(self) -> None:
        """Delete what was replaced: this run has written a whole checkpoint or model, or has ended well.

        The earlier model stays until there is a new one.
        """
        with self._mutex:
            (self.path / AGAIN).unlink(missing_ok=True)
            if self._state() is not None:
                earlier = self.path / ASIDE / "model"
                if _there(earlier):
                    if _there(self.path / "model"):
                        _remove(earlier)
                    else:
                        discard(self.path / BEFORE)
                        earlier.rename(self.path / BEFORE)
                for aside in self._asides():
                    discard(aside)
            if _there(self.path / "model"):
                discard(self.path / BEFORE)

    def settle(self, keep: Collection[str] = ()) -> bool:
        """Complete or take back what a run that ended has begun to replace.

        Args:
            keep: names of files of that run that stay.

        Returns:
            whether an earlier run's files were put back.
        """
        for left in (*(self.path / folder / ASIDE for folder in _BY_STEP), self.path / BEFORE):
            shutil.rmtree(replaced(left), ignore_errors=True)  # a kill came while it was deleted
        if _there(self.path / "model"):
            discard(self.path / BEFORE)
        if not any(self._asides()):
            return False
        state = self._state() or {"after": 0, "complete": False}
        if state["complete"] and self._has_saved(state["after"]):
            self.saved()
            return False
        if state["complete"]:
            rewritten = [self.path / name for name in _REWRITTEN if name not in keep]
            for path in [*self.replaced_by(state["after"]), *rewritten]:
                _remove(path)
            self._write_state(state["after"], complete=False)
        self._take_back()
        return True

    def _has_saved(self, after: int) -> bool:
        folder = self.path / "predictions"
        return any(path.parent != folder for path in self.replaced_by(after))

    def _take_back(self) -> None:
        """Put back what was moved aside. What is in its place already is the same, or was kept on purpose."""
        for aside in self._asides():
            for path in aside.iterdir():
                if path.name != _STATE and not _there(aside.parent / path.name):
                    path.rename(aside.parent / path.name)
            shutil.rmtree(aside)

    def _asides(self) -> Iterator[Path]:
        """Where things lie aside; that with the state is the last."""
        for folder in reversed(_BY_STEP):
            if (aside := self.path / folder / ASIDE).is_dir():
                yield aside

    def _state(self) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads((self.path / ASIDE / _STATE).read_text())
            return state
        except (OSError, ValueError):
            return None

    def _write_state(self, after: int, complete: bool) -> None:
        (self.path / ASIDE).mkdir(exist_ok=True)
        write_whole(self.path / ASIDE / _STATE, json.dumps({"after": after, "complete": complete}))


def inside(path: str | Path | None, replaced: Collection[Path]) -> Path | None:
    """The one of `replaced` that holds `path`, if any."""
    if not path:
        return None
    wanted = Path(path).resolve()
    return next((found for found in replaced if wanted.is_relative_to(found.resolve())), None)


def _aside(path: Path) -> Path:
    return path.parent / ASIDE / path.name


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _copy(path: Path, target: Path) -> None:
    copy: Callable[[Path, Path], Any] = shutil.copytree if path.is_dir() else shutil.copy2
    copy(path, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
