"""A point of a sweep runs as its own command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sphinx_pl.runtime import sweeps
from sphinx_pl.runtime.command_line import refuse_options
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY


def hydra(*task: str, sweeping: bool = True, folder: Path = Path("nowhere")) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = compose(
            "train", overrides=["hydra.mode=MULTIRUN" if sweeping else "hydra.mode=RUN"], return_hydra_config=True
        )
    cfg.hydra.overrides.task = list(task)
    cfg.hydra.sweep.dir = str(folder)
    return cfg.hydra


def test_a_point_is_named_by_what_is_swept(tmp_path: Path) -> None:
    OmegaConf.save(
        {"hydra": {"overrides": {"task": ["stage=finetune", "stage.optim.lr=1e-4,3e-4"]}}}, tmp_path / "multirun.yaml"
    )
    point = ["stage=finetune", "stage.optim.lr=0.0003", "seed=1"]  # a sweeper set the seed
    assert sweeps.point_name(hydra(*point, folder=tmp_path)) == "stage.optim.lr=0.0003 seed=1"
    assert sweeps.point_name(hydra(*point, folder=tmp_path, sweeping=False)) == ""


def test_the_command_trains_this_point_and_sweeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=1,2"])
    config = hydra()
    config.overrides.hydra = [
        "hydra.mode=MULTIRUN",
        "hydra/launcher=slurm",
        "hydra.launcher.nodes=2",
        "hydra.verbose=true",
    ]
    folder = str(tmp_path / "it's here")
    command = sweeps.command(config, ["stage=finetune", "seed=2"], folder, "seed=2")
    assert command[0] == sys.executable
    assert Path(command[-6]).is_absolute() or command[1] == "-m"
    overrides = command[-5:]
    assert overrides[:3] == ["hydra.verbose=true", "stage=finetune", "seed=2"]
    values = {o.key_or_group: str(o.value()) for o in OverridesParser.create().parse_overrides(overrides)}
    assert values["hydra.run.dir"] == folder
    assert values["point"] == "seed=2"
    assert "-m" not in overrides


def test_which_points_need_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    one, two = OmegaConf.create({"trainer": {"devices": 1}}), OmegaConf.create({"trainer": {"devices": 2}})
    assert not sweeps.needs_a_process(one, hydra())
    assert sweeps.needs_a_process(two, hydra())
    assert not sweeps.needs_a_process(two, hydra(sweeping=False))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="-m below torchrun"):
        sweeps.needs_a_process(two, hydra())


def test_a_point_s_value_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with sweeps.value_file() as path:
        assert sweeps.read_value(path) is None
        sweeps.leave_value(1.5)  # no effect, since this is not a point
        monkeypatch.setenv(sweeps.VALUE, str(path))
        sweeps.leave_value(1 / 3)
        assert sweeps.read_value(path) == 1 / 3


def test_a_signal_is_passed_on_to_the_point(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"""
import sys, time
from pathlib import Path
from sphinx_pl.runtime import signals
signals.watch()
Path({str(ready)!r}).touch()
while not signals.received():
    time.sleep(0.02)
sys.exit(128 + signals.received())
"""
    before = signal.getsignal(signal.SIGTERM)

    def tell() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)  # to this process alone

    thread = threading.Thread(target=tell)
    thread.start()
    code_of_point = sweeps.run([sys.executable, "-c", code], tmp_path / "value")
    thread.join()
    assert code_of_point == 128 + signal.SIGTERM
    assert sweeps.stopped(code_of_point)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_machine_without_slurm_is_named_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "-m", "hydra/launcher=slurm", "stage.optim.lr=1e-4,2e-4"]
    process = subprocess.run(
        [*command, f"output_dir={tmp_path}"],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    [line] = (process.stdout + process.stderr).splitlines()
    assert line.startswith("error: hydra/launcher=slurm: this machine has no sbatch or no srun; start the sweep on a")


def test_overrides_on_both_sides_of_an_option_are_refused() -> None:
    with pytest.raises(UserError, match="hydra/launcher=slurm follows an option: write options such as -m"):
        refuse_options(["stage=finetune", "-m", "hydra/launcher=slurm"])
    refuse_options(["-m", "stage=finetune", "hydra/launcher=slurm"])
