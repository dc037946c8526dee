"""The log file of a run, which a refused command leaves unchanged."""

from __future__ import annotations

import logging
import os
from pathlib import Path


class RunLog(logging.FileHandler):
    """The file of a run's log messages.

    It keeps them in memory until the run starts, so that a refused command changes no file.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(filename, delay=True, encoding="utf-8")
        self._records: list[logging.LogRecord] | None = []
        self._size: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._records is None:
            super().emit(record)
        else:
            self._records.append(record)

    def start(self) -> None:
        """Write the messages kept so far, and from now on every message at once."""
        if self._records is None:
            return
        path = Path(self.baseFilename)
        self._size = path.stat().st_size if path.is_file() else None
        records, self._records = self._records, None
        for record in records:
            self.handle(record)

    def undo(self) -> None:
        """Restore the file to its state before `start`."""
        if self._records is not None:
            return
        self.close()
        self._records = []
        path = Path(self.baseFilename)
        if self._size is None:
            path.unlink(missing_ok=True)
        elif path.is_file():
            os.truncate(path, self._size)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Ignore errors.

        A full disk ends the run when something is saved; a traceback for each message helps nobody.
        """


def run_logs() -> list[RunLog]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, RunLog)]
