"""The exceptions for a record that is not used: counted, never fatal by itself."""

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

    @property
    def counter(self) -> str:
        """The counter's name: `skipped/<reason>`."""
        return f"skipped/{self.reason}"


class Filtered(BadSample):
    """Nothing is wrong with it, but the configuration's filters do not want it."""

    @property
    def counter(self) -> str:
        return f"filtered/{self.reason}"


_SKIPPED = "skipped/"


def counter_of(source: str, what: str) -> str:
    """The name of a source's counter in a mixture: `skipped/source/reason` of what could not be used, found when it was
    drawn or when its images were decoded; else `source/what`."""
    if what.startswith(_SKIPPED):
        return f"{_SKIPPED}{source}/{what.removeprefix(_SKIPPED)}"
    return f"{source}/{what}"


def split_counter(counter: str) -> tuple[str, str]:
    """The source and what is counted, of a name by `counter_of`."""
    source, _, what = counter.removeprefix(_SKIPPED).partition("/")
    return source, f"{_SKIPPED}{what}" if counter.startswith(_SKIPPED) else what
