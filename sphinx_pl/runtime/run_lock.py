"""The lock of a run folder, which lets one run at a time write to it."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from sphinx_pl.runtime import slurm
from sphinx_pl.utils.errors import UserError

LOCK = "run.lock"


@dataclass(frozen=True)
class Holder:
    """The process that holds a run folder.

    `machine` and `boot` distinguish hosts with the same name and boots of one host. `space` is the
    namespace of process ids. `start` is the clock tick at which the process started, since ids are
    reused.
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
        """Return the process that the file names, or None if it names none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**content)
        except (ValueError, TypeError):
            return None

    def ended(self) -> bool | None:
        """Return whether the process has ended, or None if this host cannot know it."""
        here = Holder.this()
        same = self.host == here.host and self.machine == here.machine
        if same and self.machine and self.boot != here.boot:
            return True
        if same and (self.boot, self.space) == (here.boot, here.space):
            return _start_of(self.pid) != self.start if self.start else not _exists(self.pid)
        if self.job is None or (self.cluster and here.cluster and self.cluster != here.cluster):
            return None
        if self.job == here.job and self.restarts < here.restarts:
            return True  # SLURM ends a job before it restarts it
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
    """The clock tick at which a process started; "" if it has ended or there is no /proc."""
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


class RunLock:
    """The lock of a run folder: `run.lock` names the process that writes to the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK
        self._content = ""

    @property
    def held(self) -> bool:
        """Whether this process has the lock."""
        return bool(self._content)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another run holds it, this host cannot tell whether that run has ended, or
                the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        content = json.dumps(asdict(Holder.this())) + "\n"
        for _ in range(3):
            if self._create(content):
                self._content = content
                return
            self._remove_stale()
        raise UserError(f"{self.folder}: other runs start in this folder at the same time: start this run again")

    def _create(self, content: str) -> bool:
        """Make the lock with its content. Return False if there is already a lock."""
        own = self.folder / f".{LOCK}.{socket.gethostname()}-{os.getpid()}"
        try:
            own.write_text(content, encoding="utf-8")
            try:
                # The name and its content appear together, even on network disks.
                os.link(own, self.path)
            except FileExistsError:
                return False
            except OSError:  # The disk has no hard links.
                try:
                    descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                except FileExistsError:
                    return False
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(content)
            return True
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            # On a read-only disk it is an error to delete even a file that does not exist.
            with suppress(OSError):
                own.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: a run cannot write to this folder ({error.strerror or error}): choose another output_dir"
        )

    def _remove_stale(self) -> None:
        """Remove the lock of a process that has ended.

        Raises:
            UserError: it has not ended, or this host cannot know it.
        """
        try:
            content = self.path.read_text(encoding="utf-8", errors="replace")
            holder = Holder.read(self.path)
        except FileNotFoundError:
            return
        ended = holder.ended() if holder is not None else None
        who = str(holder) if holder is not None else "a process that the lock does not name"
        if ended is False:
            raise UserError(
                f"{self.folder} is in use by {who}: wait for that run or stop it, choose another folder with run=NAME, "
                f"or, if this is a copy of its folder, delete {self.path}"
            )
        if ended is None:
            raise UserError(
                f"{self.folder} is in use by {who}; this host cannot tell whether that run has ended: if it has, "
                f"delete {self.path}, else wait for it or choose another folder with run=NAME"
            )
        # A rename lets only one of two processes that find the lock stale take it over.
        stale = self.folder / f".{LOCK}.stale-{socket.gethostname()}-{os.getpid()}"
        with suppress(FileNotFoundError):
            self.path.rename(stale)
            if stale.read_text(encoding="utf-8") != content:  # this is the lock of a faster process
                with suppress(OSError):
                    os.link(stale, self.path)
            stale.unlink()

    def release(self) -> None:
        """Release the lock. A process that does not hold it does nothing."""
        if self._content and json.loads(self._content)["pid"] == os.getpid():
            with suppress(OSError):
                if self.path.read_text(encoding="utf-8") == self._content:
                    self.path.unlink()
            with suppress(OSError):
                self.folder.rmdir()  # the run wrote nothing to it
        self._content = ""
