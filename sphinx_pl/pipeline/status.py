"""The state of a pipeline, from its records and from SLURM."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from rich import box

from sphinx_pl.pipeline import slurm
from sphinx_pl.pipeline.state import State, StepRecord, is_done
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError

BAD = ("failed", "interrupted", "never starts")
"""States that make `status` end with exit code 1."""

_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "red", "never starts": "red"}


@dataclass(frozen=True)
class StepStatus:
    """The state of one step.

    Attributes:
        note: the reason for the state.
        job: its SLURM job.
        time: when it started, or how long it took.
    """

    step: str
    state: str
    note: str
    job: str
    time: str
    log: str


def look(state: State) -> list[StepStatus]:
    """Return the status of each step that the pipeline knows.

    Raises:
        UserError: there is no pipeline in this folder.
    """
    records = [record for name in state.names() if (record := state.read(name)) is not None]
    if not records:
        raise UserError(f"{state.folder}: no pipeline has run here: check experiment= and output_dir=")
    with_jobs = [record.job for record in records if record.job]
    queued: Mapping[str, slurm.Job] | None = {}
    ended: dict[str, str] = {}
    if with_jobs:
        try:
            queued = slurm.queue()
        except UserError:  # SLURM does not answer; the records are still shown
            queued = None
        ended = slurm.ended(with_jobs)
    locked = state.is_locked()
    by_name = {record.name: record for record in records}
    lines = []
    for record in records:
        name, note = state_of(record, by_name, queued, ended, locked)
        log = str(state.log(record.name)) if state.log(record.name).exists() else ""
        lines.append(StepStatus(record.name, name, note, record.job or "", took(record, name), log))
    return lines


def state_of(
    record: StepRecord,
    records: Mapping[str, StepRecord],
    queued: Mapping[str, slurm.Job] | None,
    ended: Mapping[str, str],
    locked: bool,
) -> tuple[str, str]:
    """Return a step's state and a note on it.

    SLURM's word on a job counts more than the step's last record.
    """
    job = queued.get(record.job) if queued is not None and record.job else None
    if job is not None and (record.state in ("waiting", "running") or job.state != "COMPLETING"):
        if job.state == "PENDING" and job.reason == slurm.NEVER:
            return "never starts", "a job that it depends on failed"
        if job.state in ("RUNNING", "COMPLETING"):
            return "running", ""
        return "waiting", f"{job.state.lower()}, {job.reason}"
    if record.state == "done":
        if not is_done(record):
            return "not started", "its product is missing or was changed"
        stale = [
            need
            for need in record.needs
            if need in records and records[need].made != (record.inputs or {}).get(need) and is_done(records[need])
        ]
        if record.redo:
            return "stale", "it will be repeated"
        return ("stale", f"{', '.join(stale)} was repeated") if stale else ("done", "")
    if record.state in ("failed", "interrupted"):
        return record.state, "" if record.exit is None else f"exit code {record.exit}"
    if record.launcher == "local":
        if record.state == "running":
            return ("running", "") if locked else ("interrupted", "it was killed")
        return "not started", ""
    if queued is None:
        return record.state, "SLURM does not answer"
    end = ended.get(record.job or "", "")
    if record.state == "waiting":
        return "not started", f"its job left the queue{f' ({end.lower()})' if end else ''}"
    if end in ("TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "FAILED", "BOOT_FAIL", "DEADLINE"):
        return "failed", end.lower()
    return "interrupted", end.lower() or "its job left the queue"


def took(record: StepRecord, state: str) -> str:
    """Return how long a step took, or when it started if it is running."""
    if record.started is None:
        return ""
    start = datetime.datetime.fromisoformat(record.started)
    if state == "running":
        return f"since {start.astimezone():%m-%d %H:%M}"
    if record.ended is None:
        return ""
    seconds = int((datetime.datetime.fromisoformat(record.ended) - start).total_seconds())
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def table(lines: list[StepStatus], title: str) -> Table:
    """Return the table of steps that a terminal shows."""
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("step", "state", "job", "since/took", "log"):
        result.add_column(name, overflow="fold")
    for line in lines:
        colour = _COLOURS.get(line.state, "default")
        note = f" ({line.note})" if line.note else ""
        result.add_row(line.step, f"[{colour}]{line.state}[/]{note}", line.job, line.time, line.log)
    return result
