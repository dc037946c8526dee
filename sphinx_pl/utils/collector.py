"""Two shortcuts around Python's garbage collector, for scripts that import large libraries."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection.

    Imported objects stay alive, so searching them again and again is wasted time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def leave() -> NoReturn:
    """End the process successfully without tearing down the interpreter, which takes 0.3 s with
    torch loaded.

    Call it on the last line of a script. Functions registered with `atexit` do not run.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
