"""One SLURM job for each step, each waiting for those that it needs."""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sphinx_pl.pipeline.local import shown
from sphinx_pl.pipeline.recipe import Recipe, Step
from sphinx_pl.pipeline.state import State, adopt, decide, is_done, now
from sphinx_pl.runtime.hydra_app import FAILED
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole

NEVER = "DependencyNeverSatisfied"


@dataclass(frozen=True)
class Job:
    """What SLURM says of a job: its state, such as PENDING, and why it is pending."""

    state: str
    reason: str = ""


def call(*command: str) -> str:
    """The output of one of SLURM's commands.

    Raises:
        UserError: there is no such command here, or it failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not here: launcher=slurm needs a machine that can submit jobs") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for two minutes: try again when SLURM does") from None
    if done.returncode != 0:
        raise UserError(f"{shlex.join(command)} failed:\n{done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def queue() -> dict[str, Job]:
    """This user's jobs that are waiting or running, by their ids."""
    lines = call("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%T|%r").splitlines()
    return {job: Job(state, reason) for job, state, reason in (line.split("|", 2) for line in lines)}


def ended(jobs: Iterable[str]) -> dict[str, str]:
    """How jobs that left the queue ended, such as TIMEOUT, as far as SLURM's accounting is there and knows."""
    wanted = ",".join(jobs)
    if not wanted:
        return {}
    try:
        lines = call("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={wanted}", "--format=JobID,State")
    except UserError:
        return {}
    return {job: state.split()[0] for job, _, state in (line.partition("|") for line in lines.splitlines()) if state}


def script(step: Step, state: State, name: str) -> str:
    """The job's file. It can be submitted by hand as well: `sbatch FILE`."""
    options = step.launcher
    here = Path.cwd()
    log = state.log(step.name).absolute()
    lines = [
        f"--job-name={name}-{step.name}",
        f"--chdir={here}",
        f"--output={log}",
        "--open-mode=append",
        f"--nodes={step.nodes}",
        f"--ntasks-per-node={step.tasks}",
    ]
    lines += [f"--{key}={options[key]}" for key in ("partition", "account", "qos", "time", "mem") if options[key]]
    lines += [f"--gpus-per-node={step.gpus}"] if step.gpus else []
    lines += [f"--cpus-per-task={options['cpus_per_task']}"] if options["cpus_per_task"] else []
    lines += [f"--signal={options['signal']}"] if options["signal"] and step.folder is not None else []
    lines += ["--requeue" if options["requeue"] else "--no-requeue", *options["sbatch"]]
    srun = ["srun", "--kill-on-bad-exit=1"]
    if options["cpus_per_task"]:  # srun does not take it from the job
        srun.append(f"--cpus-per-task={options['cpus_per_task']}")
    note = shlex.join([sys.executable, "-m", "sphinx_pl.cli.pipeline"])
    where = shlex.join([str(state.folder), step.name])
    header = "".join(f"#SBATCH {line}\n" for line in lines)
    setup = "".join(f"{line}\n" for line in options["setup"])
    return (
        "#!/bin/bash\n"
        + header
        + textwrap.dedent(
            f"""\
            # Step {step.name} of {name}, written by `sphinx-pipeline`.
            # By hand: sbatch {log.with_suffix(".sh")}
            # The shell outlives signals that are meant for the step, to write down how it ended.
            trap : TERM INT USR1 USR2
            """
        )
        + f"export {FAILED}={shlex.quote(str(state.failure(step.name).absolute()))}\n"
        + setup
        + f"{note} begin {where} || exit\n"
        + f"{shlex.join([*srun, *options['srun'], *step.command])}\n"
        + "code=$?\n"
        + f"{note} end {where} $code || exit\n"
        + "exit $code\n"
    )


def wanted(recipe: Recipe, state: State, queued: Mapping[str, Job]) -> dict[str, str]:
    """The steps that need a job, and why. A job in the queue is the right one as long as its step is the same and what
    it waits for gets no new job.

    Raises:
        UserError: a job that is running already would have to be another one.
    """
    decisions = decide(recipe, state)
    found: dict[str, str] = {}
    for step in recipe.steps.values():
        record = state.read(step.name)
        decision = decisions[step.name]
        job = queued.get(record.job) if record is not None and record.job else None
        if job is None or record is None:
            there = step.always and record is not None and is_done(record) and not decision.redo
            if decision.run and not there:
                found[step.name] = decision.why
            continue
        same = record.identity == step.identity and not decision.redo
        if same and job.reason != NEVER and not any(need in found for need in step.needs):
            continue
        if job.state != "PENDING":
            raise UserError(
                f"step {step.name} is {job.state.lower()} as job {record.job}, with another configuration or other "
                f"inputs: scancel {record.job} first, or let it end"
            )
        found[step.name] = f"instead of job {record.job}"
    return found


def submit(recipe: Recipe) -> int:
    """Submit what is neither done nor in the queue; jobs that wait for the wrong thing are replaced.

    Returns:
        0.

    Raises:
        UserError: SLURM refuses, or what is there is not to be touched (see `decide`).
    """
    state = State(recipe.folder)
    queued = queue()
    with state.locked():
        to_submit = wanted(recipe, state, queued)
        jobs: dict[str, str] = {}
        depends: dict[str, list[str]] = {}
        for step in recipe.steps.values():
            record = state.read(step.name)
            if step.name not in to_submit and record is not None and record.job in queued:
                jobs[step.name] = record.job
        submitted: list[str] = []
        try:
            for name in to_submit:
                step = recipe.steps[name]
                depends[name] = [jobs[need] for need in step.needs if need in jobs]
                jobs[name] = _submit_held(step, state, recipe.name, depends[name])
                submitted.append(jobs[name])
        except BaseException:  # one that is refused, or Ctrl-C: a chain without its end is not what was asked for
            for job in reversed(submitted):
                call("scancel", job)
            raise
        adopt(recipe, state)
        for step in recipe.steps.values():
            record = state.read(step.name)
            job = jobs.get(step.name, "")
            if step.name not in to_submit:
                print(f"{step.name}: {_queued_as(job, queued[job]) if job else 'done'}", flush=True)
                continue
            if record is not None and record.job in queued:
                call("scancel", record.job)
            changed = {"state": "waiting", "launcher": "slurm", "job": job, "depends": depends[step.name], "made": None}
            state.plan(step, record, **changed, submitted=now(), started=None, ended=None, exit=None)
            call("scontrol", "release", job)
            after = f" after {', '.join(depends[step.name])}" if depends[step.name] else ""
            print(f"{step.name}: job {job}{after} ({to_submit[step.name]}): {shown(step.command)}", flush=True)
    print(f"logs: {state.folder}/STEP.log; `sphinx-pipeline status` with the same overrides: where it is")
    return 0


def _submit_held(step: Step, state: State, name: str, depends: list[str]) -> str:
    """The number of the step's new job. It is held until that is written down: it could be overwritten with the job's
    own first words else.

    Raises:
        UserError: SLURM refuses it.
    """
    file = state.folder / f"{step.name}.sh"
    write_whole(file, script(step, state, name))
    waits = [f"--dependency=afterok:{':'.join(depends)}", "--kill-on-invalid-dep=yes"] if depends else []
    try:
        return call("sbatch", "--parsable", "--hold", *waits, str(file)).strip().partition(";")[0]
    except UserError as error:
        said = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).splitlines())
        raise UserError(
            f"step {step.name}: {said} (the launcher's keys say what it asks for); nothing is submitted"
        ) from None


def _queued_as(job: str, found: Job) -> str:
    held = f", held: scontrol release {job}" if found.reason == "JobHeldUser" else ""
    return f"job {job} is {found.state.lower()}{held}"


def cancel(state: State) -> int:
    """Cancel this pipeline's jobs, the last ones first; returns how many there were."""
    queued = queue()
    mine = [job for job in _jobs(state) if job in queued]
    for job in reversed(mine):
        call("scancel", job)
    return len(mine)


def _jobs(state: State) -> list[str]:
    """Of all steps that have been jobs, whether or not they are in the queue."""
    return [record.job for name in state.names() if (record := state.read(name)) and record.job]


def check_none_queued(state: State) -> None:
    """Before steps run on this machine: a job would do the same in the same folder.

    Raises:
        UserError: one of this pipeline's steps is waiting or running as a job.
    """
    jobs = _jobs(state)
    try:
        queued = queue() if jobs else {}
    except UserError:  # not a machine of that cluster
        return
    if mine := [job for job in jobs if job in queued]:
        raise UserError(
            f"{state.folder.parent}: this pipeline has jobs in SLURM's queue ({', '.join(mine)}): launcher=slurm goes "
            "on with them, `sphinx-pipeline cancel` with the same overrides cancels them"
        )


def begin(state: State, name: str, patience: float = 90.0) -> None:
    """In a job: the step begins. See `State.begin`.

    Args:
        patience: seconds until another node's last words have to be seen; file systems over a network take theirs.

    Raises:
        UserError: what it needs is not done, or another job is at the same step.
    """
    job = os.environ.get("SLURM_JOB_ID")
    record = state.read(name)
    if record is not None and record.job not in (None, job) and record.job in queue():
        raise UserError(f"step {name} is job {record.job} already: scancel {record.job} first")
    deadline = time.monotonic() + patience
    while True:
        try:
            state.begin(name, launcher="slurm", job=job)
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(2)
