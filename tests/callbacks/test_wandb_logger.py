"""Each run folder has one W&B run, offline, with W&B's own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sphinx_pl.callbacks.wandb_logger import FILE, run_id
from tests.conftest import REPOSITORY
from tests.scripts import run_script

LOG = """
import os, signal, subprocess, sys, time
from pathlib import Path
from sphinx_pl.callbacks.wandb_logger import RunLogger
from sphinx_pl.runtime import signals
signals.watch()
logger = RunLogger(save_dir=sys.argv[1], name="finetune", point=sys.argv[2], project="tests", mode="offline")
run = logger.experiment
print("name", run.name, "id", run.id)
logger.log_metrics({"loss": 1.0}, 0)
if sys.argv[3] == "end":
    children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
    own = [pid for pid in children if "wandb-core" in Path(f"/proc/{pid}/comm").read_text()]
    assert own
    os.kill(os.getpid(), signal.SIGTERM)  # to all of them, as a scheduler does
    for pid in own:
        subprocess.run(["kill", "-TERM", pid], check=True)
    time.sleep(1)
    for step in range(1, 20):  # it notices after a few
        logger.log_metrics({"loss": 1.0}, step)
        time.sleep(0.05)
    assert logger._lost, "W&B lived on: nothing is tested"
print("done")
"""


def log(folder: Path, point: str, then: str) -> str:
    script = folder / "log.py"
    script.write_text(LOG)
    # The environment lacks the W&B process that another test may have left to its children.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"WANDB_SILENT": "true"}
    process = run_script([str(script), str(folder), point, then], environment=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    name, last = process.stdout.strip().splitlines()
    assert last == "done"
    return name


@pytest.mark.timeout(400)
def test_a_folder_s_run_continues_and_loggers_outlive_w_and_b_s_process(tmp_path: Path) -> None:
    first = log(tmp_path, "stage.optim.lr=0.001", "end")
    identity = (tmp_path / FILE).read_text().strip()
    assert first == f"name finetune stage.optim.lr=0.001 id {identity}"
    assert log(tmp_path, "", "go on") == f"name finetune id {identity}"
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{identity}"))) == 2


def test_folders_have_ids_of_their_own(tmp_path: Path) -> None:
    ids = [run_id(tmp_path / name) for name in ("a", "b", "a")]
    assert ids[0] == ids[2] != ids[1]
    assert len(ids[0]) == 8
    (tmp_path / "a" / FILE).unlink()
    assert run_id(tmp_path / "a") != ids[0]


def test_a_machine_without_a_login_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    code = """
from sphinx_pl.callbacks.wandb_logger import RunLogger
from sphinx_pl.utils.errors import UserError
RunLogger(save_dir=".", name="x", mode="offline").check()
try:
    RunLogger(save_dir=".", name="x", mode="online").check()
except UserError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment | {"WANDB_BASE_URL": "http://localhost:1", "NETRC": str(tmp_path / "netrc")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.stdout.startswith("logger=wandb: No API key configured"), process.stdout + process.stderr
    assert "logger.wandb.mode=offline" in process.stdout
    assert process.stdout.count("\n") == 1
