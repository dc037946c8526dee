"""The exceptions that skip a record. A skipped record is counted; it never ends a run by itself."""

from __future__ import annotations


class SkipSample(Exception):  # noqa: N818 - not an error of the program
    """A record, caption or image cannot be used.

    `reason` is a short slug that names a counter ("box_outside"). `detail` says which record and
    why, for the log.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both are in args, so that a worker process returns them
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason

    @property
    def counter(self) -> str:
        """The counter's name: `skipped/<reason>`."""
        return f"skipped/{self.reason}"


class Filtered(SkipSample):
    """A record is fine, but the configuration's filters exclude it."""

    @property
    def counter(self) -> str:
        return f"filtered/{self.reason}"


_SKIPPED = "skipped/"


def counter_of(source: str, what: str) -> str:
    """The name of a source's counter in a mixture.

    It is `skipped/source/reason` for what is skipped, when it is drawn or when its images are
    decoded. Other counters are called `source/what`.
    """
    if what.startswith(_SKIPPED):
        return f"{_SKIPPED}{source}/{what.removeprefix(_SKIPPED)}"
    return f"{source}/{what}"


def split_counter(counter: str) -> tuple[str, str]:
    """The source and what is counted, from a name that `counter_of` gave."""
    source, _, what = counter.removeprefix(_SKIPPED).partition("/")
    return source, f"{_SKIPPED}{what}" if counter.startswith(_SKIPPED) else what
