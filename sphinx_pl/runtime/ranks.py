"""Which of a run's processes this is and who started them, known before any of them talks to another.

Three ways lead to the same ranks: tasks of `srun` (a sweep's jobs too), `torchrun`, and Lightning starting the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, open_dict

from sphinx_pl.utils.errors import UserError

if TYPE_CHECKING:
    import lightning as L
    from lightning.fabric.plugins.environments import ClusterEnvironment

log = logging.getLogger(__name__)
T = TypeVar("T")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_devices(devices: Any) -> int | None:
    """How many `trainer.devices` (a number, a list of indices) names; None if that depends on the machine (`auto`)."""
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    try:
        count = int(devices)
    except (TypeError, ValueError):
        return None
    return count if count > 0 else None


@dataclass(frozen=True)
class Processes:
    """This process and the ones beside it.

    `starter` is "srun", "torchrun", or "" where Lightning starts the others, if there are any: `world_size` is then not
    known yet.
    """

    starter: str = ""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    per_node: int = 1

    @property
    def nodes(self) -> int:
        return self.world_size // self.per_node


def this_process() -> Processes:
    """From the environment.

    `SLURM_NTASKS` says nothing: a shell in an allocation and a batch script have it without being one of several tasks.
    What counts is the step, which only `srun` makes.

    Raises:
        UserError: nodes have different numbers of tasks.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        rank, world, local, per_node = (int(env[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        return Processes("torchrun", rank, world, local, per_node)
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    # A shell that was started by `srun --pty` is a step too, but what is typed in it is started once.
    if tasks > 1 and "SLURM_PTY_PORT" not in env:
        counts = {int(n) for n in re.sub(r"\(x\d+\)", "", env["SLURM_STEP_TASKS_PER_NODE"]).split(",")}
        if len(counts) > 1:
            raise UserError(
                f"srun started SLURM_STEP_TASKS_PER_NODE={env['SLURM_STEP_TASKS_PER_NODE']} tasks: every node must "
                "have equally many, as --ntasks-per-node makes them"
            )
        return Processes("srun", int(env["SLURM_PROCID"]), tasks, int(env["SLURM_LOCALID"]), counts.pop())
    # Lightning's own: the first sets LOCAL_RANK for itself when it starts the others.
    local, node = int(env.get("LOCAL_RANK", 0)), int(env.get("NODE_RANK", 0))
    return Processes("", rank=0 if local == node == 0 else max(local, 1), local_rank=local)


def first_process() -> bool:
    """Whether this is the one that writes to the run folder."""
    return this_process().rank == 0


def usable_cores() -> int:
    """CPU cores that this process may keep busy: those it is bound to, within its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))  # "max" is no number
    return cores


def share_cores(per_node: int | None = None) -> str:
    """Give torch this process's part of the cores, unless `OMP_NUM_THREADS` says how many threads there are.

    torch takes all cores by itself, in each process of a node and whatever the control group's quota is. Where SLURM
    has bound each process to cores of its own, those are its part.

    Args:
        per_node: processes of a node, where it is more than `this_process` knows.

    Returns:
        What was chosen, in a line: the threads, and how they wait, which `sphinx_pl/__init__.py` chooses.
    """
    import torch

    processes, cores = this_process(), usable_cores()
    bound = processes.starter == "srun" and cores < int(os.environ.get("SLURM_CPUS_ON_NODE", 0))
    ours = cores if bound else max(1, cores // (per_node or processes.per_node))
    if "OMP_NUM_THREADS" not in os.environ and ours < torch.get_num_threads():
        torch.set_num_threads(ours)
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'' if threads == 1 else 's'} on {cores} core{'' if cores == 1 else 's'} ({said})"


def adopt_processes(trainer: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Write the number of processes that were started into the trainer's configuration.

    Args:
        trainer: its `devices` (of each node) and `num_nodes` are replaced.
        overrides: those of the command line: a number that was asked for is not replaced but refused.

    Raises:
        UserError: the command line asks for other numbers than were started.
    """
    processes = this_process()
    if not processes.starter:
        waiting = int(os.environ.get("SLURM_NTASKS", 1))
        if waiting > 1 and "LOCAL_RANK" not in os.environ:
            log.warning(
                "this allocation has %d tasks and train.py is not started by srun: it starts trainer.devices=%s itself",
                waiting,
                trainer.devices,
            )
        return
    for key, count in (("devices", processes.per_node), ("num_nodes", processes.nodes)):
        asked = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith(f"trainer.{key}=")]
        if asked and asked[-1] not in (str(count), "auto", "-1"):
            raise UserError(
                f"trainer.{key}={asked[-1]}, but {processes.starter} started {processes.per_node} processes on each of "
                f"{processes.nodes} nodes: leave trainer.{key} out, it follows what was started"
            )
        with open_dict(trainer):
            trainer[key] = count


def cluster_environment() -> ClusterEnvironment:
    """Lightning's view of `this_process()`, which by itself it guesses from other variables."""
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    class Tasks(SLURMEnvironment):
        """Tasks of the step that this process is one of, however many tasks the job has.

        Without Lightning's own requeueing, which saves in a signal handler, in the midst of whatever there is.
        """

        def __init__(self) -> None:
            super().__init__(auto_requeue=False)

        # They refuse `srun -n 2`, and allocations in which other numbers were asked for.
        @staticmethod
        def _validate_srun_used() -> None: ...

        @staticmethod
        def _validate_srun_variables() -> None: ...

        def validate_settings(self, num_devices: int, num_nodes: int) -> None: ...

        def world_size(self) -> int:
            return this_process().world_size

        @property
        def main_address(self) -> str:
            nodes = os.environ["SLURM_STEP_NODELIST"]
            return os.environ.setdefault("MASTER_ADDR", self.resolve_root_node_address(nodes))

        @property
        def main_port(self) -> int:
            # Jobs on one node, and steps in one job, don't meet; below the ports that systems hand out by themselves.
            job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
            return int(os.environ.setdefault("MASTER_PORT", str(12000 + (job * 37 + step) % 20000)))

    starter = this_process().starter
    if starter == "srun":
        return Tasks()
    return TorchElasticEnvironment() if starter == "torchrun" else LightningEnvironment()


def join(trainer: L.Trainer) -> None:
    """Connect with the other processes, where they are there already: Lightning would do so when training starts."""
    if this_process().starter:
        trainer.strategy.setup_environment()


def join_plainly() -> None:
    """Connect with the other processes of `srun` or `torchrun` without a trainer, on the host."""
    processes = this_process()
    if processes.starter and processes.world_size > 1:
        import torch.distributed as dist

        environment = cluster_environment()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        # They meet when all have answered, which may take some of them hours longer.
        patience = timedelta(days=7)
        dist.init_process_group("gloo", timeout=patience, rank=processes.rank, world_size=processes.world_size)


def on_first(trainer: L.Trainer, function: Callable[[], T]) -> T:
    """What `function` finds in the first process, in all of them; the others wait. After `join`.

    Where Lightning starts the others it does so later, and each calls `function`: it must find the same then.

    Raises:
        UserError: the function did, in the first process.
    """
    if not this_process().starter:
        return function()
    outcome: Any = None
    if trainer.is_global_zero:
        try:
            outcome = function(), None
        except UserError as error:
            outcome = None, str(error)
    value, problem = trainer.strategy.broadcast(outcome)
    if problem is not None:
        raise UserError(problem)
    return value  # type: ignore[no-any-return]


def only_first(trainer: L.Trainer, function: Callable[[], object]) -> None:
    """Call `function` in the first process; the others go on when it is done. As `on_first` otherwise."""
    if this_process().starter or first_process():
        on_first(trainer, lambda: function() and None)
