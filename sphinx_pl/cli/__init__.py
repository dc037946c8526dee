"""The commands. Ctrl-C ends them without a traceback, also while they still import libraries."""

import os
import sys
from types import TracebackType


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt) and os.environ.get("SPHINX_TRACEBACK") != "1":
        print("interrupted", file=sys.stderr)  # Python then ends with the exit code of a shell
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report
