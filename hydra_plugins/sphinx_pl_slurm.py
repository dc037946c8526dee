"""`hydra/launcher=slurm`: every point of a sweep is a job, every task of which runs the point's command.

hydra-submitit-launcher runs Hydra's job in each task instead: all of them write .hydra and the log, and configuration
and code are those that were pickled. With the command a task does what `srun python train.py ...` does, and finds the
same folder when its job is requeued. Lies here since Hydra takes launchers from this package only.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import open_dict

from sphinx_pl import slurm, stop, sweep
from sphinx_pl.errors import UserError

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as _SlurmLauncher
except ImportError:
    from hydra.plugins.launcher import Launcher

    class SlurmLauncher(Launcher):
        """In place of the real one, to say what is missing."""

        def __init__(self, **params: Any) -> None:
            raise UserError("hydra/launcher=slurm needs the extra 'slurm': pip install 'sphinx-pl[slurm]'")

        def setup(self, **_: Any) -> None: ...

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            return []

else:

    class SlurmLauncher(_SlurmLauncher):  # type: ignore[no-redef]
        """hydra-submitit-launcher's, except for what a task does."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            from submitit.core.utils import UncompletedJobError

            stop.unwatch()  # here nothing is trained: who waits for the jobs can be ended
            # What the tasks are given: commands; nothing of Hydra's state.
            commands, names, sweep_config = [], [], self.config
            assert self.hydra_context is not None
            assert sweep_config is not None
            for index, overrides in enumerate(job_overrides, start=initial_job_idx):
                config = self.hydra_context.config_loader.load_sweep_config(sweep_config, list(overrides))
                with open_dict(config.hydra.job):
                    config.hydra.job.num, config.hydra.job.id = index, str(index)
                folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
                name = sweep.swept(overrides, sweep_config.hydra.overrides.task)
                names.append(name)
                commands.append(sweep.command(sweep_config.hydra, overrides, str(folder), name))
            # Tasks unpickle this class, from wherever the sweep was started.
            repository = str(Path(__file__).resolve().parent.parent)
            self.params["setup"] = [
                *(self.params.get("setup") or []),
                f'export PYTHONPATH="{repository}${{PYTHONPATH:+:$PYTHONPATH}}"',
            ]
            self.commands, self.names, self.first = commands, names, initial_job_idx
            state, self.hydra_context, self.task_function = self.hydra_context, None, None
            try:
                return super().launch(job_overrides, initial_job_idx)  # type: ignore[no-any-return]
            except UncompletedJobError as error:
                raise UserError(str(error).splitlines()[0]) from None
            except KeyboardInterrupt:
                raise UserError(
                    "not waiting any longer; the jobs go on (squeue shows them, scancel ends them)"
                ) from None
            finally:
                self.hydra_context = state

        def __call__(
            self, sweep_overrides: list[str], job_dir_key: str, job_num: int, job_id: str, singleton_state: Any
        ) -> JobReturn:
            """In every task of the job."""
            done = JobReturn()
            command = self.commands[job_num - self.first]
            print(shlex.join(command), flush=True)
            with sweep.value_file() as path:
                # Signals go to it; submitit's own handler would requeue the job before it has saved.
                code = sweep.run(command, path)
                if code < 0 and -code in stop.SIGNALS and os.environ.get("SLURM_PROCID") == "0":
                    # It had not come so far that it could note the signal.
                    print(f"stopped before it began; requeue: {slurm.requeue() or 'done'}", flush=True)
                if sweep.stopped(code):
                    sys.exit(code % 256)  # no result yet
                done.status = JobStatus.COMPLETED if code == 0 else JobStatus.FAILED
                done.return_value = (
                    sweep.read_value(path)
                    if code == 0
                    else UserError(
                        f"point {job_num} ({self.names[job_num - self.first]}) failed with exit code {code}: "
                        f"see the log of job {slurm.job()} in {self.params['submitit_folder']}"
                    )
                )
            return done
