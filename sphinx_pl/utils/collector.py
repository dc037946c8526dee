"""The interpreter, kept from what cannot help: looking through objects that stay, and taking
them apart at the end.
"""

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
    """No collections meanwhile: for imports, whose objects stay, and would be looked through
    again and again.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def leave() -> NoReturn:
    """End the process as done, without taking the interpreter apart: with torch in it that takes
    0.3 s.

    For the last line of a script that leaves nothing to functions at exit.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
