"""A request to stop, as a signal brings it: only noted here, acted on where a run can be left and gone on with.

Imports nothing that takes time, so that it can be called first.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send before they kill: SIGTERM, and one that a job asks for (submitit: SIGUSR2)."""

INTERRUPT = signal.SIGINT
"""Ctrl-C."""

_received = 0
_interrupted = False


def watch(interrupt: bool = False) -> None:
    """From now on these signals are noted instead of ending the process. Only the first thread can say so.

    Args:
        interrupt: note the first Ctrl-C as well; the second one ends the process at once.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _note)
        if interrupt and signal.getsignal(INTERRUPT) is not signal.SIG_IGN:  # as nohup and a shell's `&` have it
            signal.signal(INTERRUPT, _note_interrupt)


def unwatch() -> None:
    """They end the process again."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number  # the first one says why; a scheduler's SIGTERM follows its requeue


def _note_interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    if _interrupted:
        os._exit(128 + number)
    _interrupted = True
    _note(number, frame)
    # Not by print, which may be in the midst of another one.
    os.write(2, b"\nCtrl-C: the run saves its step and ends; Ctrl-C again ends it at once, without saving\n")


def received() -> int:
    """The first signal that came, 0 if none did."""
    return _received


def forget() -> None:
    global _received, _interrupted
    _received, _interrupted = 0, False


def ignore() -> None:
    """In a helper process: a scheduler signals all processes of a job, and who helps must not go before who saves.

    It still ends when its parent tells it to, as Python does with those that are left over.
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
