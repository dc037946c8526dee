"""train.py as a user runs it: a killed run that resumes exactly, and one-line answers to wrong
input.
"""

from __future__ import annotations

import csv
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sphinx_pl.callbacks.checkpoint import checkpoints, step_of
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.training import TrainingCheckpoint
from tests.conftest import REPOSITORY
from tests.scripts import Script, run_script

# The sample model with every encoder and one layer each runs the same code in less time.
SMALL = [
    "model.decoder.layers=1",
    "model.vision.encoders.clip.layers=1",
    "model.vision.encoders.dinov2.layers=1",
    "model.vision.encoders.qformer.vision_layers=1",
    "data.packing.micro_batch_rows=2",
    "data.val_samples=8",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "logger.csv.flush_every_n_steps=1",
]


Process = subprocess.Popen[str] | Script


def command(folder: Path, data: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "train.py",
        "stage=pretrain_real",
        f"output_dir={folder}",
        f"data.root={data}",
        *SMALL,
        *overrides,
    ]


def run(folder: Path, data: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run_script(command(folder, data, *overrides)[1:])


def losses(folder: Path, column: str = "train/loss") -> dict[int, str]:
    """Return step -> training loss (or another column) as it was written.

    Equal strings are equal bits.
    """
    with (folder / "pretrain_real" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(column)]
    values = {int(row["step"]): row[column] for row in rows}
    assert len(values) == len(rows), "a step was logged twice"
    return values


# --- killed again and again


def alive(group: int) -> dict[int, tuple[int, str]]:
    """Return the running processes of a process group: PID -> parent's PID, command line."""
    processes = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent, of_group, *_ = (path / "stat").read_text().rpartition(")")[2].split()
            if int(of_group) == group and state not in "ZX":
                processes[int(path.name)] = int(parent), (path / "cmdline").read_text().replace("\0", " ")
    return processes


class Killer:
    """An outside process that kills runs of train.py at moments set only by its seed and its
    clock.
    """

    def __init__(self, run_folder: Path, seed: int) -> None:
        self.checkpoints = run_folder / "checkpoints"
        self.random = random.Random(seed)
        self.written_in: list[float] = [0.1]
        """The durations in seconds of the observed checkpoint writes."""

    def writing(self) -> bool:
        """Return whether a checkpoint is being written, or was when the run was killed."""
        return any(not path.name.endswith(".replaced.tmp") for path in self.checkpoints.glob(".step-*.tmp"))

    def newest(self) -> int:
        return max((step_of(path) for path in checkpoints(self.checkpoints)), default=0)

    def wait(self, process: Process, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not until():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def await_moment(self, process: Process, kind: str) -> None:
        if kind == "start":  # imports, making or clearing the run folder, building, loading
            self.wait(process, self._in(self.random.uniform(0, 20)))
        elif kind == "training":
            before = self.newest()
            self.wait(process, lambda: self.newest() > before)
            self.wait(process, self._in(self.random.uniform(0, 1)))
        else:
            self.wait(process, lambda: not self.writing())  # files that the previous run has left
            for number in range(self.random.randint(1, 3)):
                if number:
                    began = time.monotonic()
                    self.wait(process, lambda: not self.writing())
                    self.written_in.append(time.monotonic() - began)
                self.wait(process, self.writing)
            self.wait(process, self._in(self.random.uniform(0, statistics.median(self.written_in))))

    @staticmethod
    def _in(seconds: float) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() >= end

    def kill(self, process: Process, one_rank: bool) -> str:
        """Send SIGKILL to all processes of the run at once, or to one rank.

        Return a description.
        """
        group = process.pid
        others = [pid for pid, (parent, line) in alive(group).items() if parent == group and "train_ddp" in line]
        if not (one_rank and others):
            os.killpg(group, signal.SIGKILL)
            self._ended(process, 20)
            return "all processes"
        victim = self.random.choice([group, *others])
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        ended = self._ended(process, 60)
        target = f"{'the first' if victim == group else 'another'} rank alone, the rest "
        if ended:
            return target + f"ended by itself after {time.monotonic() - began:.1f} s"
        os.killpg(group, signal.SIGKILL)
        self._ended(process, 20)
        return target + "hung"

    @staticmethod
    def _ended(process: Process, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while process.poll() is None or alive(process.pid):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def check_readable(run_folder: Path) -> None:
    """Check that every checkpoint and model under its final name is complete, to its last
    tensor.
    """
    for path in checkpoints(run_folder / "checkpoints"):
        whole = TrainingCheckpoint(path)
        whole.shards.state()
        for name in whole:
            assert whole.tensor(name).isfinite().all()
            for kind in whole.shards.kinds():
                assert whole.shards.read(name, kind=kind).isfinite().all()
    for path in run_folder.glob("model*"):
        model = open_checkpoint(path)
        assert all(model.tensor(name).isfinite().all() for name in model)


def check_same_models(one: Path, two: Path) -> None:
    assert sorted(path.name for path in one.glob("model*")) == sorted(path.name for path in two.glob("model*"))
    for path in one.glob("model*"):
        a, b = open_checkpoint(path), open_checkpoint(two / path.name)
        assert set(a) == set(b)
        assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a), path.name


def check_kill_and_resume(
    tmp_path: Path, data: Path, kinds: Sequence[str], steps: int, ranks: int = 1, seed: int = 0, forked: bool = False
) -> None:
    """Kill a run at moments of these kinds and resume it each time, and compare it with an
    uninterrupted run.

    For the kind "writing" there are as many kills as it takes to hit this number of checkpoints
    during their writing. Forked runs import nothing.
    """
    options = [f"stage.max_steps={steps}", "callbacks.checkpoint.every_n_steps=2", "data.workers=1"]
    # Windows of two micro-batches, and validations at every third checkpoint: both have gone wrong on the way.
    options += [
        "stage.accumulate=2",
        "data.packing.micro_batch_rows=1",
        "data.packing.row_length=256",
        "stage.val_every=6",
    ]
    options += ["callbacks.export.every_n_steps=4", "callbacks.export.keep=2"]
    options += ["trainer=zero3_cpu", f"trainer.devices={ranks}"] if ranks > 1 else []

    def start(folder: Path) -> Process:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        environment["OMP_NUM_THREADS"] = "1"
        folder.mkdir(exist_ok=True)
        script = command(folder, data, *options, "ckpt_path=last")
        with (folder / "stdout").open("a") as out, (folder / "stderr").open("a") as err:
            if forked:
                return Script(script[1:], out, err, environment=environment)
            return subprocess.Popen(
                script, cwd=REPOSITORY, env=environment, stdout=out, stderr=err, text=True, start_new_session=True
            )

    def finish(folder: Path) -> None:
        process = start(folder)
        try:
            assert process.wait(1200) == 0, (folder / "stderr").read_text()[-3000:]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(straight)
    run_folder = killed / "pretrain_real"
    killer = Killer(run_folder, seed)
    remaining, kills, hits = list(kinds), 0, 0
    killer.random.shuffle(remaining)
    while remaining:
        kind = remaining.pop()
        process = start(killed)
        try:
            killer.await_moment(process, kind)
            what = killer.kill(process, one_rank=kills % 4 == 3)  # where there are others
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        # Early in a start the previous kill may have left it.
        kills, hit = kills + 1, kind != "start" and killer.writing()
        hits += hit
        print(f"kill {kills} ({kind}, seed {seed}) at step {killer.newest()}: {what}{', while writing' if hit else ''}")
        check_readable(run_folder)
        assert not (run_folder / "model").exists(), "killed too late to test anything"
        if kind == "writing" and not hit:
            assert kills < 2 * len(kinds), "most kills miss the writing"
            remaining.insert(killer.random.randint(0, len(remaining)), kind)
    assert kills >= len(kinds)
    assert hits >= list(kinds).count("writing")
    finish(killed)
    for column in ("train/loss", "val/loss"):
        assert losses(killed, column) == losses(straight, column)
    assert len(losses(killed)) == steps
    check_same_models(straight / "pretrain_real", run_folder)
    check_readable(run_folder)


def test_a_killed_run_continues_with_the_same_losses(tmp_path: Path, sample_data: Path) -> None:
    check_kill_and_resume(tmp_path, sample_data, ["training"], steps=18, forked=True)


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_twenty_times_continues_with_the_same_losses(
    ranks: int, tmp_path: Path, sample_data: Path
) -> None:
    kinds = ["writing"] * 10 + ["training"] * 6 + ["start"] * 4
    check_kill_and_resume(tmp_path, sample_data, kinds, steps=100 if ranks > 1 else 300, ranks=ranks)


# --- failed steps


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param([], id="one process"),
        pytest.param(["trainer=zero3_cpu", "trainer.devices=2"], id="two ranks", marks=pytest.mark.long),
    ],
)
def test_a_run_that_blows_up_ends_in_one_line_with_the_last_good_checkpoint(
    engine: list[str], tmp_path: Path, sample_data: Path
) -> None:
    # Each step takes away twenty times the value of a matrix, until its numbers overflow.
    options = ["stage.optim.lr=2", "stage.optim.min_lr=2", "stage.optim.weight_decay=10", "stage.optim.warmup=0"]
    options += ["stage.max_steps=30", "stage.max_nonfinite=2", "stage.val_every=0"]
    options += ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=30"]
    process = run(tmp_path, sample_data, *options, *engine)
    assert process.returncode == 2
    assert "Traceback" not in process.stdout + process.stderr
    folder = tmp_path / "pretrain_real"
    skipped = [int(n) for n in re.findall(r"step (\d+) is skipped", (folder / "train.log").read_text())]
    assert skipped == [skipped[0], skipped[0] + 1, skipped[0] + 2]
    assert skipped[0] >= 3, "no step was good: nothing is tested"
    # The first bad step used the weights of the step before it, so those are bad too.
    good = folder / "checkpoints" / f"step-{skipped[0] - 2:08d}"
    newest = checkpoints(folder / "checkpoints")[-1]
    assert step_of(newest) == skipped[-1] - 1
    error = process.stderr.strip().splitlines()[-1]
    assert error.startswith("error: 3 steps in a row")
    assert "stage.max_nonfinite" in error
    assert f"the last good checkpoint is {good}" in error
    assert not (folder / "model").exists()
    check_readable(folder)


# --- refusals


def test_a_signal_while_it_starts_ends_it_before_training(tmp_path: Path, sample_data: Path) -> None:
    """Most of a start is imports and the model.

    An unnoticed SIGTERM would end it without a message or a requeue.
    """
    process = subprocess.Popen(
        command(tmp_path, sample_data), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        output = process.communicate(timeout=240)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: nothing new to save; ckpt_path=last resumes from there" in " ".join(output.split())
    assert not checkpoints(tmp_path / "pretrain_real" / "checkpoints")


def test_a_data_worker_that_is_killed_ends_the_run_in_one_line(tmp_path: Path, sample_data: Path) -> None:
    folder, killed = tmp_path / "pretrain_real", False
    options = ["stage.max_steps=900", "stage.val_every=0", "callbacks.checkpoint.every_n_steps=1", "data.workers=1"]
    with (tmp_path / "said").open("w") as log:
        process = Script(command(tmp_path, sample_data, *options)[1:], log, log)
    try:
        while process.poll() is None:
            if not killed and checkpoints(folder / "checkpoints"):
                [worker] = [pid for pid, (parent, _) in alive(process.pid).items() if parent == process.pid]
                os.kill(worker, signal.SIGKILL)
                killed = True
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.poll() == 2
    output = (tmp_path / "said").read_text()
    assert "Traceback" not in output
    error = output.strip().splitlines()[-1]
    newest = checkpoints(folder / "checkpoints")[-1]
    assert error.startswith("error: a data worker ended before its work was done")
    assert f"{newest} is complete: ckpt_path=last resumes from it. Lower data.workers" in error
    check_readable(folder)


@pytest.mark.long
def test_ctrl_c_at_two_ranks_saves_once_and_ends_both(tmp_path: Path, sample_data: Path) -> None:
    folder = tmp_path / "pretrain_real"
    options = ["stage.max_steps=900", "stage.val_every=0", "trainer.devices=2", "data.workers=1"]
    with (tmp_path / "said").open("w") as log:
        process = Script(command(tmp_path, sample_data, *options)[1:], log, log)
    try:
        while not ((folder / "metrics.csv").is_file() and len(losses(tmp_path)) > 1):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        code = process.wait(120)
        while alive(process.pid):
            time.sleep(0.05)
    finally:
        process.kill()
    output = (tmp_path / "said").read_text()
    assert code == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    [saved] = checkpoints(folder / "checkpoints")
    assert output.count(f"SIGINT: step {step_of(saved)} is saved; ckpt_path=last resumes from there") == 1
    check_readable(folder)


@pytest.mark.long
def test_a_disk_that_is_full_ends_two_ranks_in_one_line(tmp_path: Path, sample_data: Path) -> None:
    options = ["stage.max_steps=4", "stage.val_every=0", "trainer.devices=2", "callbacks.checkpoint.every_n_steps=1"]
    limit = 8 * 2**20  # bytes of a file, too few for a checkpoint
    process = subprocess.run(
        command(tmp_path, sample_data, *options),
        cwd=REPOSITORY,
        env={key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
        capture_output=True,
        text=True,
        timeout=290,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    # each rank may print it
    [error] = {line for line in process.stderr.splitlines() if line.startswith("error: ")}
    assert "so it ends; no checkpoint was saved. Free some space first" in error
    assert not list((tmp_path / "pretrain_real").glob("checkpoints/.step*"))


@pytest.mark.parametrize(
    "preset", [*(pytest.param(name, marks=pytest.mark.long) for name in ("one_batch", "overfit")), "profiler"]
)
def test_debug_presets_run(preset: str, tmp_path: Path, sample_data: Path) -> None:
    steps = ["stage.max_steps=3"] if preset == "overfit" else []
    process = run(tmp_path, sample_data, f"debug={preset}", *steps)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / f"pretrain_real-{preset}"
    assert (folder / "model" / "config.json").is_file()
    assert list(folder.glob("*profile*")) or preset != "profiler"


def test_a_sweep_runs_each_point_in_a_folder_of_its_own(tmp_path: Path, sample_data: Path) -> None:
    # A user gives no output_dir, unlike other tests.
    script = [str(REPOSITORY / "train.py"), "-m", "stage=pretrain_real", f"data.root={sample_data}"]
    process = run_script([*script, *SMALL, "stage.max_steps=1", "stage.optim.lr=1e-4,3e-4"], tmp_path)
    assert process.returncode == 0, process.stderr
    folders = sorted((tmp_path / "outputs" / "demo" / "sweeps" / "pretrain_real").glob("[01]"))
    assert len(folders) == 2
    assert all((folder / "model" / "config.json").is_file() for folder in folders)


WRONG = {
    "an unknown option": (["stage=pretrian"], "pretrian"),
    "heads that do not divide": (["model.decoder.heads=7"], "model.decoder.heads=7"),
    "a rate of a part that does not exist": (["+stage.optim.lr_scale.clpi=0.5"], "clip"),
    "no text in pretraining": (["data.sources.text=null"], "text"),
    "a missing resume file": (["ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    "a folder to resume from": (["ckpt_path=conf", "overwrite=true"], "stage.init_from"),
    "nothing to train": (["stage.train_parts=[]"], "train_parts is empty"),
    "a kind of source that does not exist": (["data.sources.real.kind=image_txt"], "image_text"),
    "no heads": (["model.vision.encoders.clip.heads=0"], "model.vision.encoders.clip.heads must be positive"),
    "an encoder's key of before": (["model.vision.clip.load=x"], "is called model.vision.encoders.clip.load now"),
    "an encoder of before": (["model.vision.clip=null"], "did you mean model.vision.encoders.clip"),
    "no decimals": (["data.processor.decimals=0"], "data.processor.decimals=0"),
    "a wrong type": (["model.decoder.layers=two"], "model.decoder.layers"),
    "frozen parts kept in a way there is none": (["trainer=zero3_cpu", "trainer.strategy.frozen=half"], "frozen=half"),
    "a place to offload to": (["trainer=zero3_cpu", "trainer.strategy.offload_optimizer=gpu"], "offload_optimizer=gpu"),
    "a disk that is not named": (["trainer=zero3_cpu", "trainer.strategy.offload_optimizer=nvme"], "nvme_path"),
    "a precision of another engine": (
        ["trainer=zero3_cpu", "trainer.precision=16-mixed"],
        "trainer.precision=16-mixed",
    ),
    "a dtype that is none": (["trainer=fsdp2", "trainer.strategy.compute_dtype=bf32"], "compute_dtype=bf32"),
    "a way to recompute": (["stage.checkpointing=half"], "stage.checkpointing=half"),
    "GPUs where there are none": (["trainer=zero3", "trainer.accelerator=gpu", "trainer.devices=1"], "gpu"),
    "no device": (["trainer.devices=0"], "devices"),
    "rows that do not divide": (["stage.global_batch_rows=7"], "stage.global_batch_rows=7 is not a multiple"),
    "an optimizer that is none": (["stage.optim.kind=adam"], "adamw"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_answered_in_one_line(
    case: str, tmp_path: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra.core.global_hydra import GlobalHydra

    from sphinx_pl.cli import train

    overrides, needle = WRONG[case]
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [*command(tmp_path, sample_data, "stage.max_steps=1")[1:], *overrides])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as exit_info:
        train.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert needle in error[-1]
    assert not any("Traceback" in line for line in error)


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_sweep_whose_points_need_two_processes_is_swept_once(tmp_path: Path, sample_data: Path) -> None:
    """Lightning starts the second process with the command line of the first.

    With `-m` it would sweep as well.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    options = ["stage.max_steps=2", "stage.optim.lr=1e-4,3e-4", "trainer.devices=2"]
    process = subprocess.run(
        [*command(tmp_path, sample_data, *options), "-m"],
        cwd=REPOSITORY,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sweeps"]
    folders = sorted((tmp_path / "sweeps" / "pretrain_real").glob("[0-9]*"))
    assert [folder.name for folder in folders] == ["0", "1"]
    for folder, rate in zip(folders, ("0.0001", "0.0003"), strict=True):
        assert (folder / "model" / "config.json").is_file()
        assert [path.name for path in folder.glob("*.log")] == ["train.log"]
        begun = [line for line in (folder / "train.log").read_text().splitlines() if line.endswith(f"in {folder}")]
        assert len(begun) == 1
        assert f"pretrain_real, point stage.optim.lr={rate} in" in begun[0]
        (folder / "pretrain_real").symlink_to(folder)  # where `losses` looks
        assert len(losses(folder)) == 2
