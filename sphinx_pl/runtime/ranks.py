"""The rank of this process and the program that started the ranks, before any of them communicate.

Three starters lead to the same ranks: tasks of `srun` (also in a sweep's jobs), `torchrun`, and
Lightning, which starts the other processes.
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
    """Return how many devices `trainer.devices` names (a number or a list of indices).

    Returns:
        None if the number depends on the machine (`auto`).
    """
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    try:
        count = int(devices)
    except (TypeError, ValueError):
        return None
    return count if count > 0 else None


@dataclass(frozen=True)
class Processes:
    """This process and the processes beside it.

    `starter` is "srun", "torchrun", or "" if Lightning starts the others. In that case `world_size`
    is not known yet.
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
    """Return the ranks that the environment describes.

    `SLURM_NTASKS` does not count: a shell in an allocation and a batch script have it without being
    one of several tasks. Only `srun` makes a step, so the step's variables count.

    Raises:
        UserError: the nodes have different numbers of tasks.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        rank, world, local, per_node = (int(env[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        return Processes("torchrun", rank, world, local, per_node)
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    # A shell started by `srun --pty` is a step too, but a command typed in it starts once.
    if tasks > 1 and "SLURM_PTY_PORT" not in env:
        counts = {int(n) for n in re.sub(r"\(x\d+\)", "", env["SLURM_STEP_TASKS_PER_NODE"]).split(",")}
        if len(counts) > 1:
            raise UserError(
                f"srun started SLURM_STEP_TASKS_PER_NODE={env['SLURM_STEP_TASKS_PER_NODE']} tasks: every node must "
                "have the same number of tasks; use --ntasks-per-node"
            )
        return Processes("srun", int(env["SLURM_PROCID"]), tasks, int(env["SLURM_LOCALID"]), counts.pop())
    # The first process sets LOCAL_RANK for itself when Lightning starts the others.
    local, node = int(env.get("LOCAL_RANK", 0)), int(env.get("NODE_RANK", 0))
    return Processes("", rank=0 if local == node == 0 else max(local, 1), local_rank=local)


def first_process() -> bool:
    """Return whether this process writes to the run folder."""
    return this_process().rank == 0


def usable_cores() -> int:
    """Return the number of CPU cores that this process may keep busy.

    They are the cores it is bound to, within the quota of its control group.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))  # "max" raises ValueError
    return cores


def share_cores(per_node: int | None = None) -> str:
    """Give torch this process's share of the cores, unless `OMP_NUM_THREADS` sets the number of
    threads.

    By default torch takes all cores in each process of a node and ignores the control group's
    quota. If SLURM has bound each process to its own cores, those are its share.

    Args:
        per_node: the number of processes on a node, if it is larger than `this_process` knows.

    Returns:
        A line with the number of threads and how they wait, which `sphinx_pl/__init__.py` sets.
    """
    import torch

    processes, cores = this_process(), usable_cores()
    bound = processes.starter == "srun" and cores < int(os.environ.get("SLURM_CPUS_ON_NODE", 0))
    share = cores if bound else max(1, cores // (per_node or processes.per_node))
    if "OMP_NUM_THREADS" not in os.environ and share < torch.get_num_threads():
        torch.set_num_threads(share)
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    settings = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'' if threads == 1 else 's'} on {cores} core{'' if cores == 1 else 's'} ({settings})"


def adopt_processes(trainer: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Write the number of started processes into the trainer's configuration.

    Args:
        trainer: the configuration whose `devices` (on each node) and `num_nodes` are replaced.
        overrides: the overrides of the command line. A number given there is not replaced but
            refused.

    Raises:
        UserError: the command line asks for other numbers of processes than were started.
    """
    processes = this_process()
    if not processes.starter:
        waiting = int(os.environ.get("SLURM_NTASKS", 1))
        if waiting > 1 and "LOCAL_RANK" not in os.environ:
            log.warning(
                "this allocation has %d tasks, but srun did not start train.py: it starts trainer.devices=%s itself",
                waiting,
                trainer.devices,
            )
        return
    for key, count in (("devices", processes.per_node), ("num_nodes", processes.nodes)):
        requests = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith(f"trainer.{key}=")]
        if requests and requests[-1] not in (str(count), "auto", "-1"):
            raise UserError(
                f"trainer.{key}={requests[-1]}, but {processes.starter} started {processes.per_node} processes on each "
                f"of {processes.nodes} nodes: omit trainer.{key}, which follows the started processes"
            )
        with open_dict(trainer):
            trainer[key] = count


def cluster_environment() -> ClusterEnvironment:
    """Return Lightning's view of `this_process()`.

    Lightning alone would guess it from other variables.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    class Tasks(SLURMEnvironment):
        """The tasks of this process's step, however many tasks the job has.

        Lightning's own requeueing is off, since it saves in a signal handler, at an arbitrary
        moment.
        """

        def __init__(self) -> None:
            super().__init__(auto_requeue=False)

        # Lightning's checks refuse `srun -n 2`, and allocations that asked for other numbers.
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
            # Jobs on one node, and steps in one job, use different ports. They lie below the ports
            # that systems assign themselves.
            job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
            return int(os.environ.setdefault("MASTER_PORT", str(12000 + (job * 37 + step) % 20000)))

    starter = this_process().starter
    if starter == "srun":
        return Tasks()
    return TorchElasticEnvironment() if starter == "torchrun" else LightningEnvironment()


def join(trainer: L.Trainer) -> None:
    """Connect to the other processes if they are already running.

    Lightning would connect only when training starts.
    """
    if this_process().starter:
        trainer.strategy.setup_environment()


def join_plainly() -> None:
    """Connect to the other processes of `srun` or `torchrun` without a trainer, on the host."""
    processes = this_process()
    if processes.starter and processes.world_size > 1:
        import torch.distributed as dist

        environment = cluster_environment()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        # The processes meet when all have finished answering, and some may take hours longer.
        patience = timedelta(days=7)
        dist.init_process_group("gloo", timeout=patience, rank=processes.rank, world_size=processes.world_size)


def on_first(trainer: L.Trainer, function: Callable[[], T]) -> T:
    """Return in all processes what `function` returns in the first one, while the others wait.

    Call it after `join`.

    If Lightning starts the other processes, it does so later, and each calls `function`. It must
    then return the same value.

    Raises:
        UserError: the function raised it in the first process.
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
    """Call `function` in the first process; the others continue when it is done. See `on_first`."""
    if this_process().starter or first_process():
        on_first(trainer, lambda: function() and None)
