"""A request to stop, as a signal brings it: only noted here, acted on where a run can be left and gone on with.

Imports nothing that takes time, so that it can be called first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send before they kill: SIGTERM, and one that a job asks for (submitit: SIGUSR2)."""

_received = 0


def watch() -> None:
    """From now on these signals are noted instead of ending the process. Other threads than the first can't."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number  # the first one says why; a scheduler's SIGTERM follows its requeue


def received() -> int:
    """The first signal that came, 0 if none did."""
    return _received


def forget() -> None:
    global _received
    _received = 0


# A scheduler signals all processes of a job, and who helps must not go before who saves.


def ignore() -> None:
    """In a helper process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def shielded() -> Iterator[None]:
    """Programs that this thread starts meanwhile don't get the signals; this process gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
