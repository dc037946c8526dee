"""The exceptions for a record that is not used: counted, never fatal by itself."""

from __future__ import annotations


class SkipSample(Exception):  # noqa: N818 - not an error of the program
    """A record, caption or image that is no use.

    `reason` is a short slug that names a counter ("box_outside"); `detail` says which and why, for the log.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both in args, so that it comes back whole from a worker process
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason

    @property
    def counter(self) -> str:
        """The counter's name: `skipped/<reason>`."""
        return f"skipped/{self.reason}"


class Filtered(SkipSample):
    """Nothing is wrong with it, but the configuration's filters do not want it."""

    @property
    def counter(self) -> str:
        return f"filtered/{self.reason}"
