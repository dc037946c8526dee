"""Notes signals that ask the process to stop.

A run acts on them where it can stop and later resume.

The module imports nothing slow, so that a script can call it first.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that schedulers send before they kill: SIGTERM, and one that a job asks for."""

INTERRUPT = signal.SIGINT
"""Ctrl-C."""

_received = 0
_interrupted = False


def watch(interrupt: bool = False) -> None:
    """Note these signals from now on instead of ending the process.

    Only the main thread can do this.

    Args:
        interrupt: note the first Ctrl-C as well. The second one ends the process at once.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _note)
        # under nohup or a shell's `&`
        if interrupt and signal.getsignal(INTERRUPT) is not signal.SIG_IGN:
            signal.signal(INTERRUPT, _note_interrupt)


def unwatch() -> None:
    """Let these signals end the process."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    # The first signal tells the reason. After a requeue a scheduler sends SIGTERM as well.
    _received = _received or number


def _note_interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    if _interrupted:
        os._exit(128 + number)
    _interrupted = True
    _note(number, frame)
    # print would not be safe, since the signal may interrupt another print.
    os.write(2, b"\nCtrl-C: the run saves its step and ends; a second Ctrl-C ends it at once, without saving\n")


def received() -> int:
    """Return the first signal that came, or 0."""
    return _received


def forget() -> None:
    global _received, _interrupted
    _received, _interrupted = 0, False


def ignore() -> None:
    """Ignore these signals in a helper process.

    A scheduler signals all processes of a job, and a helper must not end before the process that
    saves. It still ends when its parent terminates it, as Python does with child processes that are
    left at exit.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2, INTERRUPT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    parent = os.getppid()
    threading.Thread(target=wait, name="wait-for-parent", daemon=True).start()
