"""Submits one SLURM job for each step. Each job waits for the jobs that it needs."""

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

from sphinx_pl.pipeline.local import as_typed
from sphinx_pl.pipeline.recipe import Recipe, Step
from sphinx_pl.pipeline.state import State, adopt, decide, is_done, now
from sphinx_pl.runtime.hydra_app import FAILED
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole

NEVER = "DependencyNeverSatisfied"


@dataclass(frozen=True)
class Job:
    """The state of a job in SLURM, such as PENDING, and the reason why it is pending."""

    state: str
    reason: str = ""


def call(*command: str) -> str:
    """Return the output of one of SLURM's commands.

    Raises:
        UserError: this machine lacks the command, or it failed.
    """
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not here: launcher=slurm needs a machine that can submit jobs") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for two minutes: try again when SLURM answers") from None
    if process.returncode != 0:
        raise UserError(f"{shlex.join(command)} failed:\n{process.stderr.strip() or process.stdout.strip()}")
    return process.stdout


def queue() -> dict[str, Job]:
    """Return this user's waiting and running jobs by id."""
    lines = call("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%T|%r").splitlines()
    return {job: Job(state, reason) for job, state, reason in (line.split("|", 2) for line in lines)}


def ended(jobs: Iterable[str]) -> dict[str, str]:
    """Return how jobs that left the queue ended, such as TIMEOUT.

    Jobs that SLURM's accounting does not know are missing.
    """
    ids = ",".join(jobs)
    if not ids:
        return {}
    try:
        lines = call("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={ids}", "--format=JobID,State")
    except UserError:
        return {}
    return {job: state.split()[0] for job, _, state in (line.partition("|") for line in lines.splitlines()) if state}


def script(step: Step, state: State, name: str) -> str:
    """Return the content of the job's file, which can also be submitted by hand: `sbatch FILE`."""
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
    if options["cpus_per_task"]:  # srun does not inherit it from the job
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
            # The shell outlives signals meant for the step, so that it can record how the step ended.
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


def steps_to_submit(recipe: Recipe, state: State, queued: Mapping[str, Job]) -> dict[str, str]:
    """Return the steps that need a job, and why.

    A queued job stays if its step is unchanged and the steps it depends on get no new job.

    Raises:
        UserError: a job that is already running would have to be replaced.
    """
    decisions = decide(recipe, state)
    reasons: dict[str, str] = {}
    for step in recipe.steps.values():
        record = state.read(step.name)
        decision = decisions[step.name]
        job = queued.get(record.job) if record is not None and record.job else None
        if job is None or record is None:
            finished = step.always and record is not None and is_done(record) and not decision.redo
            if decision.run and not finished:
                reasons[step.name] = decision.why
            continue
        same = record.identity == step.identity and not decision.redo
        if same and job.reason != NEVER and not any(need in reasons for need in step.needs):
            continue
        if job.state != "PENDING":
            raise UserError(
                f"step {step.name} is {job.state.lower()} as job {record.job}, with another configuration or other "
                f"inputs: cancel it with scancel {record.job}, or let it end"
            )
        reasons[step.name] = f"it replaces job {record.job}"
    return reasons


def submit(recipe: Recipe) -> int:
    """Submit the steps that are neither done nor in the queue.

    Jobs with an outdated dependency are replaced.

    Returns:
        0.

    Raises:
        UserError: SLURM refuses a job, or the files of a step must not be replaced (see `decide`).
    """
    state = State(recipe.folder)
    queued = queue()
    with state.locked():
        to_submit = steps_to_submit(recipe, state, queued)
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
        except BaseException:  # SLURM refused a job, or Ctrl-C: half a chain is not submitted
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
            changes = {"state": "waiting", "launcher": "slurm", "job": job, "depends": depends[step.name], "made": None}
            state.plan(step, record, **changes, submitted=now(), started=None, ended=None, exit=None)
            call("scontrol", "release", job)
            after = f" after {', '.join(depends[step.name])}" if depends[step.name] else ""
            print(f"{step.name}: job {job}{after} ({to_submit[step.name]}): {as_typed(step.command)}", flush=True)
    print(f"logs: {state.folder}/STEP.log; `sphinx-pipeline status` with the same overrides shows the state")
    return 0


def _submit_held(step: Step, state: State, name: str, depends: list[str]) -> str:
    """Return the number of the step's new job.

    The job is held until its number is recorded. Otherwise the record could overwrite what the job
    itself has recorded.

    Raises:
        UserError: SLURM refuses the job.
    """
    file = state.folder / f"{step.name}.sh"
    write_whole(file, script(step, state, name))
    waits = [f"--dependency=afterok:{':'.join(depends)}", "--kill-on-invalid-dep=yes"] if depends else []
    try:
        return call("sbatch", "--parsable", "--hold", *waits, str(file)).strip().partition(";")[0]
    except UserError as error:
        message = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).splitlines())
        raise UserError(
            f"step {step.name}: {message} (the launcher's keys set its resources); nothing is submitted"
        ) from None


def _queued_as(number: str, job: Job) -> str:
    hint = f", held: scontrol release {number}" if job.reason == "JobHeldUser" else ""
    return f"job {number} is {job.state.lower()}{hint}"


def cancel(state: State) -> int:
    """Cancel this pipeline's jobs, the last one first, and return their number."""
    queued = queue()
    own_jobs = [job for job in _jobs(state) if job in queued]
    for job in reversed(own_jobs):
        call("scancel", job)
    return len(own_jobs)


def _jobs(state: State) -> list[str]:
    """Return the jobs of all steps, whether or not they are still in the queue."""
    return [record.job for name in state.names() if (record := state.read(name)) and record.job]


def check_none_queued(state: State) -> None:
    """Check that no job of this pipeline is queued before steps run on this machine in the same
    folder.

    Raises:
        UserError: one of this pipeline's steps is waiting or running as a job.
    """
    jobs = _jobs(state)
    try:
        queued = queue() if jobs else {}
    except UserError:  # this machine does not belong to that cluster
        return
    if own_jobs := [job for job in jobs if job in queued]:
        raise UserError(
            f"{state.folder.parent}: this pipeline has jobs in SLURM's queue ({', '.join(own_jobs)}): launcher=slurm "
            "continues them, `sphinx-pipeline cancel` with the same overrides cancels them"
        )


def begin(state: State, name: str, patience: float = 90.0) -> None:
    """Begin a step inside its job. See `State.begin`.

    Args:
        patience: seconds until records from another node must be visible; network file systems
            delay them.

    Raises:
        UserError: a step that it needs is not done, or another job runs the same step.
    """
    job = os.environ.get("SLURM_JOB_ID")
    record = state.read(name)
    if record is not None and record.job not in (None, job) and record.job in queue():
        raise UserError(f"step {name} already runs as job {record.job}: cancel it with scancel {record.job}")
    deadline = time.monotonic() + patience
    while True:
        try:
            state.begin(name, launcher="slurm", job=job)
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(2)
