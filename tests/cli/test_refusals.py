"""A refused command, at whatever moment, changes no byte of the finished run in its folder."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sphinx_pl.callbacks.checkpoint import checkpoints
from sphinx_pl.cli import run_setup, train
from sphinx_pl.distributed import checkpointing
from sphinx_pl.runtime import signals
from sphinx_pl.runtime.run_lock import LOCK, Holder
from sphinx_pl.stages.build import build_model
from sphinx_pl.utils.errors import UserError
from tests.cli.test_train import command, run
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("signals_as_before")

FIRST = "checkpoints/step-00000001"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, sample_data: Path) -> Path:
    """Return the folder of a run of two steps, which keeps both checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    process = run(folder, sample_data, "stage.max_steps=2", "callbacks.checkpoint.every_n_steps=1")
    assert process.returncode == 0, process.stderr
    return folder / "pretrain_real"


def hashes(folder: Path) -> dict[str, str]:
    """Return every file's name and hash."""
    return {
        str(path.relative_to(folder)): xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.is_file() else ""
        for path in folder.rglob("*")
    }


NEW = ["overwrite=true", "callbacks.checkpoint.every_n_steps=1"]
LAST = ["ckpt_path=last", "stage.max_steps=4"]
EARLIER = ["ckpt_path=RUN/checkpoints/step-00000001", "overwrite=true", "stage.max_steps=4"]
EARLY = {
    "nothing asked for": ([], "already holds a run"),
    "newer ones": (["ckpt_path=RUN/checkpoints/step-00000001"], "holds newer ones (step-00000002)"),
    "no such checkpoint": ([*NEW, "ckpt_path=RUN/checkpoints/step-00000009"], "not a checkpoint to resume from"),
    "other parts": ([*EARLIER, "stage.train_parts=[decoder]"], "stage.train_parts=[decoder]: in ckpt_path"),
    "another optimizer": ([*LAST, "stage.optim.kind=sgd"], "set stage.optim.kind=adamw"),
    "other rates": ([*LAST, "+stage.optim.lr_scale.decoder=0.5"], "lr_scale"),
    "another seed": ([*LAST, "seed=5"], "set seed=0"),
    "another seed, from before": ([*EARLIER, "seed=5"], "set seed=0"),
    "other sources": (
        [*EARLIER, "data.sources.text=null", "stage.text_required=false"],
        "the checkpoint was made with",
    ),
    "other partitions": ([*LAST, "data.mixing.partitions=2"], "leave it null"),
    "another model of the same shapes": ([*LAST, "+model.decoder.norm_eps=1e-3"], "model.decoder.norm_eps is"),
    "another model": ([*LAST, "model.decoder.layers=2"], "model.decoder.layers is"),
    "another tokenizer": ([*LAST, f"data.tokenizer={REPOSITORY}/tests/golden/tokenizer.model"], "tokenizer"),
    "no weights to start from": ([*NEW, "stage.init_from=nowhere"], "stage.init_from=nowhere"),
    "weights that it replaces": ([*NEW, "stage.init_from=RUN/model"], "which this run replaces"),
    "a tokenizer that it replaces": ([*LAST, "data.tokenizer=RUN/model/tokenizer.model"], "which this run replaces"),
    "no data": ([*NEW, "data.sources.real.path=nowhere.tar"], "nowhere.tar"),
    "an unknown part": ([*NEW, "stage.train_parts=[decodr]"], "decoder"),
    "an unknown key": ([*NEW, "stage.optim.learning_rate=1"], "learning_rate"),
    "a model folder that is none": ([*NEW, "callbacks.export.folder=RUN/checkpoints"], "is not a checkpoint"),
    "no such benchmark": (
        [*NEW, "callbacks.evaluation.every_n_steps=1", "callbacks.evaluation.benchmarks=[nothing]"],
        "nothing",
    ),
}
LATE = {
    "rows that hold nothing": ([*NEW, "data.packing.row_length=8", "data.val_sources={}"], "row_length"),
    "held-out data that hold nothing": ([*EARLIER, "data.packing.row_length=8"], "raise data.packing.row_length=8"),
}


def refused(
    overrides: list[str], folder: Path, data: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Return the exit code of train.py and its last line. The folder must be unchanged."""
    before = hashes(folder)
    options = [override.replace("RUN", str(folder)) for override in overrides]
    patch.chdir(REPOSITORY)
    patch.setattr(sys, "argv", [*command(folder.parent, data)[1:], "stage.max_steps=2", *options])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as exit_info:
        train.main()
    assert hashes(folder) == before
    return int(str(exit_info.value.code)), capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("case", [*EARLY, *LATE])
def test_a_refused_command_changes_nothing(
    case: str,
    finished: Path,
    sample_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides, needle = (EARLY | LATE)[case]
    built: list[Any] = []
    monkeypatch.setattr("sphinx_pl.stages.stage.build_model", _noted(build_model, built))
    code, error = refused(overrides, finished, sample_data, monkeypatch, capsys)
    assert code == 2
    assert error.startswith("error: ")
    assert needle in error
    assert not built or case in LATE, "the model was built before it was refused"


def _noted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return call


def test_a_run_that_is_replaced_begins_anew(
    finished: Path,
    sample_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "pretrain_real"
    shutil.copytree(finished, folder)
    called(folder, sample_data, monkeypatch, capsys, "stage.max_steps=1", "overwrite=true")
    assert [path.name for path in checkpoints(folder / "checkpoints")] == [Path(FIRST).name]


def test_a_run_that_another_host_may_work_in_is_left_alone(
    finished: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / LOCK).write_text(json.dumps(asdict(replace(Holder.this(), host="another"))))
    try:
        code, error = refused(NEW, finished, sample_data, monkeypatch, capsys)
    finally:
        (finished / LOCK).unlink()
    assert (code, "cannot tell" in error) == (2, True)


def test_a_disk_without_room_is_refused(
    finished: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1000))
    code, error = refused(NEW, finished, sample_data, monkeypatch, capsys)
    assert code == 2
    assert "the disk has 1.0 kB left: free some space, lower callbacks.checkpoint.keep" in error


def test_a_disk_that_fills_before_the_first_checkpoint_is_whole(
    finished: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(folder / "pieces"))

    monkeypatch.setattr(checkpointing, "write_shards", full)
    for overrides in (NEW, EARLIER):
        code, _ = refused(overrides, finished, sample_data, monkeypatch, capsys)
        assert code == 2


def test_a_disk_that_fills_while_the_folder_is_prepared_is_one_line(
    finished: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run_setup, "write_whole", full)
    code, error = refused(NEW, finished, sample_data, monkeypatch, capsys)
    assert code == 2
    assert "cannot write" in error
    assert "Free some space first" in error


def test_a_run_that_is_stopped_before_its_first_step_replaces_nothing(
    finished: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signals._note(signal.SIGTERM, None)
    code, _ = refused(NEW, finished, sample_data, monkeypatch, capsys)
    assert code == 128 + signal.SIGTERM


def called(
    folder: Path, data: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str
) -> str:
    """Return the output of a train.py with this run folder, in one line."""
    patch.chdir(REPOSITORY)
    patch.setattr(sys, "argv", [*command(folder.parent, data)[1:], *overrides])
    GlobalHydra.instance().clear()
    train.main()
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_has_no_step_left_leaves_every_byte(
    steps: int, finished: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(finished)
    output = called(finished, sample_data, monkeypatch, capsys, "ckpt_path=last", f"stage.max_steps={steps}")
    assert hashes(finished) == before
    assert f"has already passed step {steps}, and its newest checkpoint is from step 2" in output
    assert "set stage.max_steps above 2 to train further" in output


def test_a_run_that_ended_with_its_data_leaves_every_byte(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (sample_data / "text/train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n")
    few = ["data.sources.real=null", f"data.sources.text.path={tmp_path}/few.jsonl", "data.mixing.epochs=1"]
    few += ["data.val_sources={}", "stage.max_steps=50", "stage.accumulate=4"]  # the last step has empty rows
    process = run(tmp_path, sample_data, *few)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "pretrain_real"
    before = hashes(folder)
    output = called(folder, sample_data, monkeypatch, capsys, "ckpt_path=last", *few)
    assert hashes(folder) == before
    assert "has already read its sources as often as their epochs say" in output
    assert "raise data.mixing.epochs to train further" in output


def test_a_model_that_is_missing_is_written_without_a_new_description_of_the_run(
    finished: Path,
    sample_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "pretrain_real"
    shutil.copytree(finished, folder)
    before = hashes(folder)
    shutil.rmtree(folder / "model")
    called(folder, sample_data, monkeypatch, capsys, "ckpt_path=last", "stage.max_steps=1")
    after = hashes(folder)
    assert {name for name in before if before[name] != after[name]} <= {"train.log", "model/provenance.json"}
    assert (folder / "train.log").read_bytes().startswith((finished / "train.log").read_bytes())


# --- messages


def test_weights_that_a_step_of_the_recipe_makes_are_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)  # elsewhere it names the installed command

    def cfg(start: str | None) -> Any:
        return OmegaConf.create({"output_dir": str(tmp_path), "stage": {"init_from": start}})

    with pytest.raises(UserError, match=rf"stage.init_from={tmp_path}/mixed does not exist: 'python mix_weights.py"):
        train.check_init_from(cfg(f"{tmp_path}/mixed"))
    model = f"{tmp_path}/pretrain_real/model"
    with pytest.raises(UserError, match=r"'python train\.py stage=pretrain_real' makes it"):
        train.check_init_from(cfg(model))
    (tmp_path / "pretrain_real/model-before").mkdir(parents=True)
    with pytest.raises(UserError, match=r"the model of an earlier run is in .*model-before"):
        train.check_init_from(cfg(model))
    (tmp_path / "pretrain_real/model").mkdir()
    for fine in (model, None, "elsewhere", "hf-hub:a/b"):  # the stage checks the last two
        train.check_init_from(cfg(fine))


def test_the_place_of_the_model_comes_with_commands_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "run" / "model"
    for missing in (None, model):
        assert "run holds no model, since callbacks.export writes none" in train.say_where(missing, tmp_path / "run")
    model.mkdir(parents=True)
    monkeypatch.chdir(REPOSITORY)
    assert train.say_where(model, tmp_path / "run") == (
        f"the model is in {model}: evaluate it with `python evaluate.py checkpoint={model}`, "
        f"talk to it with `python chat.py checkpoint={model}`"
    )
    monkeypatch.chdir(tmp_path)  # as a person would type it there
    assert train.say_where(model, tmp_path / "run") == (
        "the model is in run/model: evaluate it with `sphinx-evaluate checkpoint=run/model`, "
        "talk to it with `sphinx-chat checkpoint=run/model`"
    )


def test_a_full_disk_is_reported_with_the_checkpoint_that_is_kept(tmp_path: Path) -> None:
    error = OSError(28, "No space left on device", str(tmp_path / "metrics.csv"))
    assert "no checkpoint was saved" in train.disk_failed(error, tmp_path)
    (tmp_path / "checkpoints/step-00000003").mkdir(parents=True)
    message = train.disk_failed(error, tmp_path)
    assert f"cannot write '{tmp_path}/metrics.csv' (No space left on device)" in message
    assert f"{tmp_path}/checkpoints/step-00000003 is complete: ckpt_path=last" in message
    assert "\n" not in message


def test_differences_of_a_resumed_run_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {"stage": {"max_steps": 2, "optim": {"lr": 1.0}, "val_every": 1}, "data": {"workers": 1, "seed": 0}}
    before |= {"trainer": {"precision": "32-true", "devices": 1}}
    (tmp_path / "provenance.json").write_text(json.dumps({"config": before}))
    now = {"stage": {"max_steps": 4, "optim": {"lr": 2.0}, "val_every": 2}, "data": {"workers": 2, "seed": 0}}
    now |= {"trainer": {"precision": "bf16-mixed", "devices": 2}}
    train.warn_of_changes(OmegaConf.create(now), tmp_path)
    [record] = caplog.records
    assert record.getMessage() == (
        "in the checkpoint and in this run: stage.max_steps is 2 and 4, stage.optim.lr is 1.0 and 2.0, "
        "trainer.precision is '32-true' and 'bf16-mixed'"
    )
    train.warn_of_changes(OmegaConf.create(before), tmp_path)
    assert len(caplog.records) == 1
