"""Runs the steps of a recipe one after another on this machine."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import BinaryIO

from sphinx_pl.pipeline.recipe import Recipe, Step
from sphinx_pl.pipeline.state import Decision, State, adopt, decide

_PR_SET_PDEATHSIG = 1
# A log file must not contain colours and cursor movements.
_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


class _Stop:
    """Passes Ctrl-C, SIGTERM and SIGHUP on to the running step.

    The first signal asks the step to stop. A second one, or `grace` seconds, kill it.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.process: subprocess.Popen[bytes] | None = None
        self.count = 0
        self.deadline = float("inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.process is None:
            return
        if self.count == 1:
            print(
                f"\nstopping: the step has {self.grace:g} s to end; a second signal kills it",
                file=sys.stderr,
                flush=True,
            )
            self.deadline = time.monotonic() + self.grace
            # Only the process itself gets the signal, so that it can save before its helpers, such
            # as data workers, end.
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
        else:
            self.deadline = 0.0

    @contextmanager
    def listening(self) -> Iterator[_Stop]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = [signal.signal(number, self) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)


def run(recipe: Recipe, command: str) -> int:
    """Run the steps that are not done.

    A failed step stops the steps that need it; the others still run.

    Args:
        command: the command that resumes the pipeline, for messages.

    Returns:
        0 when everything is done, 1 after a failure, 130 after a signal.

    Raises:
        UserError: another pipeline runs in this folder, or the files of a step must not be replaced
            (see `decide`).
    """
    state = State(recipe.folder)
    with state.locked() as lock:
        decide(recipe, state)  # a refusal must come before any change
        adopt(recipe, state)
        settled = dataclasses.replace(recipe, redo=frozenset())  # the records hold it now
        failed: list[str] = []
        stopped_by: dict[str, str] = {}
        count = 0
        grace = next(iter(recipe.steps.values())).launcher["grace"]
        with _Stop(float(grace)).listening() as stop:
            for number, step in enumerate(recipe.steps.values(), start=1):
                title = f"[{number}/{len(recipe.steps)}] {step.name}"
                if blocked := [need for need in step.needs if need in failed or need in stopped_by]:
                    stopped_by[step.name] = blocked[0]
                    continue
                # An earlier step may have changed its product, so this decision is made again.
                decision = decide(settled, state)[step.name]
                if not decision.run:
                    print(f"{title}: {decision.why}", flush=True)
                    continue
                code = _run_step(title, step, decision, state, stop, lock)
                if stop.count:
                    print(f"step {step.name} was interrupted; to resume: {command}", file=sys.stderr)
                    return 130
                count += not step.always
                record = state.read(step.name)
                if record is not None and record.state != "done":
                    failed.append(step.name)
                    reason = f"it ended with exit code {code}" if code else f"it did not write {step.product}"
                    print(
                        f"step {step.name} failed: {reason}; log: {state.log(step.name)}; to resume: {command}",
                        file=sys.stderr,
                        flush=True,
                    )
    if stopped_by:
        print(f"not started: {', '.join(stopped_by)}", file=sys.stderr)
    if failed:
        return 1
    if not count:
        _repeat_results(recipe, state)
    return 0


def _run_step(title: str, step: Step, decision: Decision, state: State, stop: _Stop, lock: int) -> int:
    record = state.read(step.name)
    if record is not None and not step.always:
        title += f" ({decision.why})"
    print(f"\n{title}: {as_typed(step.command)}", flush=True)
    state.plan(step, record, launcher="local", job=None, depends=[])
    record = state.begin(step.name)
    with state.log(step.name).open("ab") as log:
        log.write(f"\n$ {shlex.join(step.command)}\n".encode())
        code = _follow(step.command, log, stop, lock)
    state.end(step.name, code, interrupted=stop.count > 0)
    return code


def as_typed(command: tuple[str, ...]) -> str:
    """Return a command as a user would type it."""
    return shlex.join(["python", *command[1:]])


def _repeat_results(recipe: Recipe, state: State) -> None:
    """Print the output of the last step, when everything was done before."""
    name = list(recipe.steps)[-1]
    print("\neverything is done already (redo=all repeats it)", flush=True)
    log = state.log(name)
    if log.is_file():
        text = log.read_text(encoding="utf-8", errors="replace")
        print(text.rpartition("\n$ ")[2].partition("\n")[2], end="", flush=True)


def _die_with_parent() -> None:
    """Ask, in the child process, for SIGTERM if the pipeline is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _follow(command: tuple[str, ...], log: BinaryIO, stop: _Stop, lock: int) -> int:
    """Run a command, pass its output through and log it.

    On a terminal the command gets a terminal of its own, so that it draws progress bars.

    Returns:
        Its exit code, as a shell reports it: 128 + signal.
    """
    terminal = sys.stdout.isatty()
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        with suppress(OSError):
            columns, rows = shutil.get_terminal_size()
            termios.tcsetwinsize(theirs, (rows, columns))
    stop.process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,  # Ctrl-C reaches it once, through this process
        pass_fds=[lock],
        preexec_fn=_die_with_parent,
    )
    os.close(theirs)
    process = stop.process
    if stop.count:  # the signal came between two steps
        process.send_signal(signal.SIGTERM)
    os.set_blocking(ours, False)
    line = b""
    while True:
        ended = process.poll() is not None
        block = _read(ours)
        if block:
            with suppress(OSError):
                os.write(sys.stdout.fileno(), block)
            *lines, line = (line + block).split(b"\n")
            for complete in lines:
                log.write(_plain(complete) + b"\n")
            log.flush()
        elif ended:
            break
        else:
            time.sleep(0.05)
        if time.monotonic() > stop.deadline:
            stop.deadline = float("inf")
            _kill_group(process.pid)
    log.write(_plain(line))
    os.close(ours)
    stop.process = None
    _kill_group(process.pid)  # it ends ranks or workers that outlived the process
    code = process.returncode
    return code if code >= 0 else 128 - code


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except (BlockingIOError, OSError):  # no output yet, or a closed terminal
        return b""


def _plain(line: bytes) -> bytes:
    """Return the text that a terminal finally shows of a line."""
    return _CONTROL.sub(b"", line.rstrip(b"\r").rpartition(b"\r")[2])


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def dry_run(recipe: Recipe) -> int:
    """Print each step's command and whether it would run."""
    state = State(recipe.folder)
    for name, decision in decide(recipe, state).items():
        print(f"# {name}: {decision.why}")
        print(("" if decision.run else "# ") + as_typed(recipe.steps[name].command))
    return 0
