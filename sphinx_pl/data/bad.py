"""The one exception for a record that cannot be used: skipped and counted, never fatal by itself."""

from __future__ import annotations


class BadSample(Exception):  # noqa: N818 - not an error of the program
    """A record, caption or image that is no use.

    `reason` is a short slug that names a counter ("box_outside"); `detail` says which and why, for the log.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both in args, so that it comes back whole from a worker process
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
