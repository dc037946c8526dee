"""`hydra/launcher=slurm`: every point of a sweep is a job, and every task of the job runs the
point's command.

hydra-submitit-launcher would run Hydra's job in each task. All tasks would then write .hydra and
the log, with pickled configuration and code. With the command, a task does what `srun python
train.py ...` does, and finds the same folder when its job is requeued. This module lies here
because Hydra takes launchers only from this package.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import open_dict

from sphinx_pl.runtime import signals, slurm, sweeps
from sphinx_pl.utils.errors import UserError

try:
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as _SlurmLauncher
except ImportError:
    from hydra.plugins.launcher import Launcher

    class SlurmLauncher(Launcher):
        """The launcher of hydra-submitit-launcher, except for the work of a task."""

        def __init__(self, **params: Any) -> None:
            raise UserError("hydra/launcher=slurm needs the extra 'slurm': pip install 'sphinx-pl[slurm]'")

        def setup(self, **_: Any) -> None: ...

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            return []

else:

    class SlurmLauncher(_SlurmLauncher):  # type: ignore[no-redef]
        """A stand-in for the real launcher, which reports what is missing."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            signals.unwatch()  # nothing is trained here, so waiting may be interrupted
            # The tasks get commands, and nothing of Hydra's state.
            commands, names, sweep_config = [], [], self.config
            assert self.hydra_context is not None
            assert sweep_config is not None
            for index, overrides in enumerate(job_overrides, start=initial_job_idx):
                config = self.hydra_context.config_loader.load_sweep_config(sweep_config, list(overrides))
                with open_dict(config.hydra.job):
                    config.hydra.job.num, config.hydra.job.id = index, str(index)
                folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
                name = sweeps.swept(overrides, sweep_config.hydra.overrides.task)
                names.append(name)
                commands.append(sweeps.command(sweep_config.hydra, overrides, str(folder), name))
            # Tasks unpickle this class, wherever the sweep was started.
            repository = str(Path(__file__).resolve().parent.parent)
            self.params["setup"] = [
                *(self.params.get("setup") or []),
                f'export PYTHONPATH="{repository}${{PYTHONPATH:+:$PYTHONPATH}}"',
            ]
            self.commands, self.names, self.first = commands, names, initial_job_idx
            state, self.hydra_context, self.task_function = self.hydra_context, None, None
            try:
                jobs = self._submit(job_overrides, initial_job_idx)
                for number, (job, name) in enumerate(zip(jobs, names, strict=True), start=initial_job_idx):
                    print(f"job {job.job_id}: point {number} ({name}); log: {job.paths.stdout}", flush=True)
                print("waiting for the jobs; Ctrl-C stops waiting, but not the jobs", flush=True)
                return _wait(jobs, names, initial_job_idx)
            except KeyboardInterrupt:
                raise UserError("stopped waiting; the jobs continue (squeue shows them, scancel ends them)") from None
            finally:
                self.hydra_context = state

        def _submit(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
            """Return the submitted jobs.

            The original does the same, but prints nothing and waits for one job after another.

            Raises:
                UserError: SLURM refuses them.
            """
            import submitit
            from submitit.core.utils import FailedJobError

            if shutil.which("sbatch") is None or shutil.which("srun") is None:
                raise UserError(
                    "hydra/launcher=slurm: this machine has no sbatch or no srun; start the sweep on a login node, or "
                    "without hydra/launcher=slurm to run its points here in turn"
                )
            ours = {"submitit_folder", "max_num_timeout"}
            executor = submitit.AutoExecutor(
                cluster="slurm",
                folder=self.params["submitit_folder"],
                slurm_max_num_timeout=self.params["max_num_timeout"],
            )
            general = {field.name for field in dataclasses.fields(BaseQueueConf)}
            named = {k if k in general else f"slurm_{k}": v for k, v in self.params.items() if k not in ours}
            executor.update_parameters(**named)
            points = [(list(overrides), "", number, "", None) for number, overrides in enumerate(job_overrides, first)]
            try:
                return list(executor.map_array(self, *zip(*points, strict=True)))
            except FailedJobError as error:
                message = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).splitlines())
                raise UserError(f"SLURM refuses the jobs: {message} (hydra.launcher.* sets their resources)") from None

        def __call__(
            self, sweep_overrides: list[str], job_dir_key: str, job_num: int, job_id: str, singleton_state: Any
        ) -> JobReturn:
            """Run the command of the point in each task of the job."""
            result = JobReturn()
            command = self.commands[job_num - self.first]
            print(shlex.join(command), flush=True)
            with sweeps.value_file() as path:
                # Signals are passed on to the command. submitit's own handler would requeue the job
                # before it has saved.
                code = sweeps.run(command, path)
                if code < 0 and -code in signals.SIGNALS and os.environ.get("SLURM_PROCID") == "0":
                    # The command was killed before it could note the signal.
                    print(f"stopped before it began; requeue: {slurm.requeue() or 'done'}", flush=True)
                if sweeps.stopped(code):
                    sys.exit(code % 256)  # there is no result yet
                if code:  # an exception, so that SLURM counts the job as failed
                    raise UserError(
                        f"point {job_num} ({self.names[job_num - self.first]}) failed with exit code {code}"
                    )
                result.status, result.return_value = JobStatus.COMPLETED, sweeps.read_value(path)
            return result

    def _wait(jobs: list[Any], names: list[str], first: int) -> list[JobReturn]:
        """Return the results of all jobs when all have ended. Failures are printed at once."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        results: dict[int, JobReturn] = {}
        while len(results) < len(jobs):
            for number, job in enumerate(jobs):
                if number in results or not job.done():
                    continue
                point = f"point {first + number} ({names[number]})"
                try:
                    results[number] = job.results()[0]
                    print(f"{point} is done", flush=True)
                except UncompletedJobError as error:
                    # its task printed the reason; otherwise SLURM may know it
                    failed = isinstance(error, FailedJobError)
                    state = "" if failed else f" ({job.watcher.get_state(job.job_id, mode='force').lower()})"
                    problem = f"{point} failed{state}: see the log of job {job.job_id}: {job.paths.stdout}"
                    print(problem, file=sys.stderr, flush=True)
                    results[number] = JobReturn(overrides=[names[number]], status=JobStatus.FAILED)
                    results[number].return_value = UserError(problem)
            time.sleep(1)
        return [results[number] for number in range(len(jobs))]
