"""Steps one after another on this machine."""

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
# Colours and movements of the cursor, which a log file is better without.
_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


class _Stop:
    """Ctrl-C, SIGTERM and SIGHUP: the running step is told to stop, a second time (or after `grace` s) it is killed."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.process: subprocess.Popen[bytes] | None = None
        self.asked = 0
        self.deadline = float("inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.process is None:
            return
        if self.asked == 1:
            print(f"\nstopping (again to kill at once; at most {self.grace:g} s) ...", file=sys.stderr, flush=True)
            self.deadline = time.monotonic() + self.grace
            # Only the process itself: it saves what it has before its helpers, such as data workers, end.
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
        else:
            self.deadline = 0.0

    @contextmanager
    def listening(self) -> Iterator[_Stop]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [signal.signal(number, self) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def run(recipe: Recipe, again: str) -> int:
    """Run what is not done. A step that fails stops those that need it, others go on.

    Args:
        again: the command that continues, for messages.

    Returns:
        0 when everything is done, 1 after a failure, 130 when stopped.

    Raises:
        UserError: another pipeline runs in this folder, or what is there is not to be touched (see `decide`).
    """
    state = State(recipe.folder)
    with state.locked() as lock:
        decide(recipe, state)  # whatever is refused is refused before anything changes
        adopt(recipe, state)
        settled = dataclasses.replace(recipe, redo=frozenset())  # the records say it now
        failed: list[str] = []
        stopped_by: dict[str, str] = {}
        did = 0
        grace = next(iter(recipe.steps.values())).launcher["grace"]
        with _Stop(float(grace)).listening() as stop:
            for number, step in enumerate(recipe.steps.values(), start=1):
                title = f"[{number}/{len(recipe.steps)}] {step.name}"
                if blocked := [need for need in step.needs if need in failed or need in stopped_by]:
                    stopped_by[step.name] = blocked[0]
                    continue
                # Asked anew: what a step before has made may have changed.
                decision = decide(settled, state)[step.name]
                if not decision.run:
                    print(f"{title}: {decision.why}", flush=True)
                    continue
                code = _run_step(title, step, decision, state, stop, lock)
                if stop.asked:
                    print(f"step {step.name} was interrupted; to go on: {again}", file=sys.stderr)
                    return 130
                did += not step.always
                record = state.read(step.name)
                if record is not None and record.state != "done":
                    failed.append(step.name)
                    said = f"ended with exit code {code}" if code else f"ended well but did not write {step.product}"
                    print(
                        f"step {step.name} failed: {said}; log: {state.log(step.name)}; to go on: {again}",
                        file=sys.stderr,
                        flush=True,
                    )
    if stopped_by:
        print(f"not started: {', '.join(stopped_by)}", file=sys.stderr)
    if failed:
        return 1
    if not did:
        _repeat_results(recipe, state)
    return 0


def _run_step(title: str, step: Step, decision: Decision, state: State, stop: _Stop, lock: int) -> int:
    record = state.read(step.name)
    if record is not None and not step.always:
        title += f" ({decision.why})"
    print(f"\n{title}: {shown(step.command)}", flush=True)
    state.plan(step, record, launcher="local", job=None, depends=[])
    record = state.begin(step.name)
    with state.log(step.name).open("ab") as log:
        log.write(f"\n$ {shlex.join(step.command)}\n".encode())
        code = _follow(step.command, log, stop, lock)
    state.end(step.name, code, interrupted=stop.asked > 0)
    return code


def shown(command: tuple[str, ...]) -> str:
    """A command as a user would type it."""
    return shlex.join(["python", *command[1:]])


def _repeat_results(recipe: Recipe, state: State) -> None:
    """Everything was done before: what the last step said."""
    name = list(recipe.steps)[-1]
    print("\neverything is done already (redo=all makes it anew)", flush=True)
    log = state.log(name)
    if log.is_file():
        text = log.read_text(encoding="utf-8", errors="replace")
        print(text.rpartition("\n$ ")[2].partition("\n")[2], end="", flush=True)


def _die_with_parent() -> None:
    """In the child: should the pipeline be killed, this process is told to stop."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _follow(command: tuple[str, ...], log: BinaryIO, stop: _Stop, lock: int) -> int:
    """Run a command, its output passed through and logged; returns its exit code (as a shell has it: 128 + signal).

    On a terminal it gets one of its own, so that bars are drawn.
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
        start_new_session=True,  # Ctrl-C reaches it through us, once
        pass_fds=[lock],
        preexec_fn=_die_with_parent,
    )
    os.close(theirs)
    process = stop.process
    if stop.asked:  # between two steps
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
            for whole in lines:
                log.write(_plain(whole) + b"\n")
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
    _kill_group(process.pid)  # ranks or workers that outlived it
    code = process.returncode
    return code if code >= 0 else 128 - code


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except (BlockingIOError, OSError):  # nothing there; a terminal whose other end is closed
        return b""


def _plain(line: bytes) -> bytes:
    """What a terminal shows of a line in the end."""
    return _CONTROL.sub(b"", line.rstrip(b"\r").rpartition(b"\r")[2])


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def dry_run(recipe: Recipe) -> int:
    """Print each step's command and whether it would run."""
    state = State(recipe.folder)
    for name, decision in decide(recipe, state).items():
        print(f"# {name}: {decision.why}")
        print(("" if decision.run else "# ") + shown(recipe.steps[name].command))
    return 0
