"""Ranks as each starter's environment describes them, and similar environments of single
processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from omegaconf import OmegaConf

import sphinx_pl
from sphinx_pl.runtime import ranks
from sphinx_pl.runtime.ranks import (
    Processes,
    adopt_processes,
    cluster_environment,
    count_devices,
    first_process,
    this_process,
    usable_cores,
)
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY

STEP = {
    "SLURM_JOB_ID": "812",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_STEP_NODELIST": "gpu[07,11]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in (
            *ELASTIC,
            "NODE_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            monkeypatch.delenv(name)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # so that what a test sets is removed after it
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_task_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, STEP)
    assert this_process() == Processes("srun", rank=4, world_size=6, local_rank=1, per_node=3)
    assert this_process().nodes == 2
    assert not first_process()
    cluster = cluster_environment()
    assert cluster.creates_processes_externally
    assert (
        cluster.global_rank(),
        cluster.world_size(),
        cluster.local_rank(),
        cluster.node_rank(),
    ) == (4, 6, 1, 1)
    assert cluster.main_address == "gpu07"
    assert not cluster.auto_requeue  # type: ignore[attr-defined]


def test_steps_of_one_job_and_neighbouring_jobs_use_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job in range(800, 820):
        for step in range(3):
            environment(monkeypatch, STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            monkeypatch.delenv("MASTER_PORT", raising=False)
            ports.add(cluster_environment().main_port)
    assert len(ports) == 60
    assert all(10000 < port < 32768 for port in ports)


def test_an_interactive_job_s_step_counts_whatever_the_job_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `salloc` and `srun -n 6 python train.py`, Lightning alone would take each task for a
    run of its own.
    """
    environment(monkeypatch, STEP | {"SLURM_JOB_NAME": "interactive"})
    assert this_process().world_size == 6
    assert cluster_environment().world_size() == 6


@pytest.mark.parametrize(
    "left",
    [
        # A shell in an allocation, and a batch script that does not use srun.
        {"SLURM_NTASKS": "6", "SLURM_JOB_ID": "812", "SLURM_JOB_NAME": "train"},
        {"SLURM_NTASKS": "6", "SLURM_JOB_ID": "812", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
        # one task, which may start others itself
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        STEP | {"SLURM_PTY_PORT": "4711", "SLURM_PROCID": "0"},  # a shell of `srun --pty`
    ],
)
def test_an_allocation_alone_starts_nothing(monkeypatch: pytest.MonkeyPatch, left: dict[str, str]) -> None:
    environment(monkeypatch, left)
    assert this_process() == Processes()
    assert first_process()
    assert isinstance(cluster_environment(), LightningEnvironment)
    trainer = OmegaConf.create({"devices": 2})
    adopt_processes(trainer)
    assert trainer == {"devices": 2}


def test_torchrun_counts_in_a_slurm_task_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    environment(monkeypatch, STEP | ELASTIC)
    assert this_process() == Processes("torchrun", rank=3, world_size=4, local_rank=1, per_node=2)
    assert isinstance(cluster_environment(), TorchElasticEnvironment)


@pytest.mark.parametrize(("local", "node", "first"), [("0", "0", True), ("1", "0", False), ("0", "1", False)])
def test_processes_that_lightning_starts(monkeypatch: pytest.MonkeyPatch, local: str, node: str, first: bool) -> None:
    environment(monkeypatch, {"LOCAL_RANK": local, "NODE_RANK": node})
    assert first_process() is first
    assert this_process().starter == ""


def test_nodes_with_different_numbers_of_tasks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1,1"})
    with pytest.raises(UserError, match=r"2\(x2\),1,1.*--ntasks-per-node"):
        this_process()


def test_the_trainer_follows_the_started_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, STEP)
    trainer = OmegaConf.create({"devices": 1})
    OmegaConf.set_struct(trainer, True)
    adopt_processes(trainer, ["stage=finetune", "trainer.devices=3"])
    assert trainer == {"devices": 3, "num_nodes": 2}
    with pytest.raises(UserError, match=r"trainer\.devices=8, but srun started 3 processes on each of 2 nodes"):
        adopt_processes(trainer, ["trainer.devices=8"])
    with pytest.raises(UserError, match=r"trainer\.num_nodes=1"):
        adopt_processes(trainer, ["+trainer.num_nodes=1"])


@pytest.mark.parametrize(
    ("devices", "count"),
    [(8, 8), ("8", 8), ([0, 2, 5], 3), (OmegaConf.create([1, 3]), 2), ("auto", None), (-1, None), (None, None)],
)
def test_devices_are_counted(devices: object, count: int | None) -> None:
    assert count_devices(devices) == count


PRINT_THREADS = "import sphinx_pl.runtime.ranks as p, torch; print(p.share_cores({})); print(torch.get_num_threads())"


def threads(per_node: str = "", **environment: str) -> list[str]:
    """Return the output of a separate process, since OpenMP reads its environment only once."""
    names = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    inherited = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("SLURM_")}
    command = [sys.executable, "-c", PRINT_THREADS.format(per_node)]
    process = subprocess.run(command, cwd=REPOSITORY, env=inherited | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_waiting_threads_sleep_soon_unless_the_user_sets_another_policy() -> None:
    cores = usable_cores()
    line, count = threads(per_node=str(2 * cores))  # more processes than cores
    start, _, spins = line.rstrip(")").partition("=")
    assert start == f"1 CPU thread on {cores} core{'' if cores == 1 else 's'} (GOMP_SPINCOUNT"
    assert int(spins) in {sphinx_pl.SPINS_ALONE, sphinx_pl.SPINS_BESIDE}
    assert count == "1"
    line, count = threads(str(2 * cores), OMP_NUM_THREADS=str(cores), OMP_WAIT_POLICY="ACTIVE")
    assert line.endswith(f"(OMP_NUM_THREADS={cores}, OMP_WAIT_POLICY=ACTIVE)")
    assert count == str(cores)


@pytest.mark.parametrize(
    ("later", "spins"),
    [
        ((90, 100), sphinx_pl.SPINS_ALONE),  # idle but for this process
        ((70, 100), sphinx_pl.SPINS_BESIDE),
        ((0, 100), sphinx_pl.SPINS_BESIDE),
        ((0, 0), sphinx_pl.SPINS_BESIDE),  # /proc/stat cannot be read, or no tick has passed
    ],
)
def test_threads_spin_longer_where_cores_are_idle(
    later: tuple[int, int], spins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(0, 0), later])
    monkeypatch.setattr(sphinx_pl, "cpu_times", lambda: next(times))
    assert sphinx_pl.choose_spins() == spins


def test_a_control_group_s_quota_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "CPU_QUOTA", tmp_path / "cpu.max")
    alone = len(os.sched_getaffinity(0))
    assert usable_cores() == alone
    for quota, cores in (("max 100000", alone), ("100000 100000", 1), ("50000 100000", 1), ("9900000 100000", alone)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert usable_cores() == cores
