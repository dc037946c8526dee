"""The run's result, which every other script loads."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from safetensors import safe_open

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint
from sphinx_pl.callbacks.csv_logger import MetricsCSV
from sphinx_pl.callbacks.export import ExportModel
from sphinx_pl.checkpoints import training
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.checkpoints.training import WEIGHT, TensorShard, describe, write_rest, write_shards
from sphinx_pl.cli.train import finish_export
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY
from tests.ranks import on_ranks

Fit = Callable[..., Any]


def test_the_export_is_the_trained_model_with_its_prompt_format(
    fit: Fit, datamodule: DataModule, model_config: SphinxConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    fit([ExportModel(str(folder))], steps=1)
    (folder / "leftover.txt").touch()
    config = tmp_path / "config.yaml"
    config.write_text("seed: 0\nstage: {name: finetune}\n")
    _, stage = fit([ExportModel(str(folder), config=str(config))], steps=2)
    assert not (folder / "leftover.txt").exists()  # the earlier run is replaced completely

    checkpoint = open_checkpoint(folder)
    assert checkpoint.model_config == model_config
    model = Sphinx(checkpoint.model_config)
    checkpoint.load_into(model)
    for name, value in stage.sphinx.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

    processor = Processor.from_dict(checkpoint.processor, folder / "tokenizer.model", checkpoint.model_config)
    record = datamodule.planner().mixture.streams["tasks"].source.record(0)
    assert processor.prompt(record) == datamodule.processor.prompt(record)

    assert checkpoint.provenance["steps"] == 2
    assert checkpoint.provenance["stage"] == "finetune"
    assert checkpoint.provenance["config"] == {"seed": 0, "stage": {"name": "finetune"}}
    assert checkpoint.provenance["parents"] == []


def test_every_n_steps_and_in_the_dtype_that_was_asked_for(fit: Fit, tmp_path: Path) -> None:
    _, stage = fit([ExportModel(str(tmp_path / "model"), dtype="bfloat16", every_n_steps=2)], steps=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-step-2", "model-step-4"]
    tensors: dict[str, torch.Tensor] = {}
    for shard in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    for name, value in stage.sphinx.state_dict().items():
        if name in tensors:
            assert torch.equal(tensors[name], value.bfloat16()), name
    assert len(tensors) > 50
    assert open_checkpoint(tmp_path / "model-step-4").provenance["steps"] == 4
    # Models written during training: the steps differ from each other and from the end.
    weights = []
    for name in ("model-step-2", "model-step-4", "model"):
        model = Sphinx(open_checkpoint(tmp_path / name).model_config)
        open_checkpoint(tmp_path / name).load_into(model)
        weights.append(model.decoder.layers[0].attention.wq.weight)
    assert not any(torch.equal(a, b) for a, b in [(weights[0], weights[1]), (weights[1], weights[2])])


def test_a_folder_of_something_else_is_refused_before_training(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    batches: list[Any] = []
    counter = LambdaCallback(on_train_batch_end=lambda *args: batches.append(args))
    with pytest.raises(UserError, match="is not a checkpoint"):
        fit([counter, ExportModel(str(tmp_path))])
    assert batches == []
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unknown_dtype_is_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"callbacks\.export\.dtype='float8' must be one of float32, bfloat16, float16"):
        ExportModel("model", dtype="float8")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_same(model: Path, checkpoint: Path) -> None:
    a, b = open_checkpoint(model), open_checkpoint(checkpoint)
    assert set(a) == set(b)
    assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a)


# --- which ones stay


def logged(values: dict[int, float]) -> L.Callback:
    """Return a callback that sets a metric after each of these steps."""

    def log(trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in values:
            trainer.callback_metrics["score"] = torch.tensor(values[trainer.global_step])

    return LambdaCallback(on_train_batch_end=log)


@pytest.mark.parametrize(
    ("keep", "keep_best", "mode", "expected"),
    [
        (0, 0, "min", [1, 2, 3, 4, 5]),
        (2, 0, "min", [4, 5]),
        (1, 2, "min", [2, 4, 5]),
        (1, 9, "min", [1, 2, 4, 5]),
        (1, 2, "max", [1, 5]),
    ],
)
def test_the_newest_and_the_best_stay(
    keep: int, keep_best: int, mode: str, expected: list[int], fit: Fit, tmp_path: Path
) -> None:
    (tmp_path / "model-step-notes").mkdir()
    scores = logged({1: 6.0, 2: 1.0, 3: math.nan, 4: 5.0, 5: 7.0})
    export = ExportModel(
        str(tmp_path / "model"), every_n_steps=1, keep=keep, keep_best=keep_best, metric="score", mode=mode
    )
    fit([scores, export], steps=6)
    assert names(tmp_path) == ["model", *(f"model-step-{step}" for step in expected), "model-step-notes"]


def test_a_validation_of_the_same_step_comes_first(fit: Fit, tmp_path: Path) -> None:
    """Otherwise the model would have the previous value, and a run that resumes from its checkpoint
    none.
    """
    listings: list[list[str]] = []
    callback = LambdaCallback(on_validation_start=lambda *_: listings.append(names(tmp_path / "checkpoints")))
    (tmp_path / "checkpoints").mkdir()
    checkpoint = ResumeCheckpoint(str(tmp_path / "checkpoints"), every_n_steps=100, keep=9)
    export = ExportModel(str(tmp_path / "model"), every_n_steps=1)
    # validates after steps 2 and 4
    fit([callback, checkpoint, export], [MetricsCSV(str(tmp_path), 1)], steps=5)
    assert listings == [["step-00000001"], [f"step-0000000{step}" for step in (1, 2, 3)]]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/loss")
    losses = [float(value) for row in rows[1:] if (value := row.split(",")[column])]
    for step, loss in ((2, losses[0]), (3, losses[0]), (4, losses[1])):
        metric = open_checkpoint(tmp_path / f"model-step-{step}").provenance["metric"]
        assert metric["name"] == "val/loss"
        assert metric["value"] == pytest.approx(loss, rel=1e-6)


def test_a_checkpoint_being_read_is_not_pruned(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, later = tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-00000005"
    presences: list[bool] = []

    def slow(checkpoint: Path, *args: Any) -> None:
        if checkpoint.name == "step-00000003":
            deadline = time.monotonic() + 60
            while not later.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            presences.extend((later.exists(), checkpoint.exists()))
        consolidate(checkpoint, *args)

    consolidate = training.consolidate
    monkeypatch.setattr("sphinx_pl.callbacks.export.consolidate", slow)
    fit(
        [ResumeCheckpoint(str(own), every_n_steps=1, keep=1), ExportModel(str(tmp_path / "model"), every_n_steps=3)],
        steps=7,
        val_check_interval=100,
    )
    assert presences == [True, True]
    assert open_checkpoint(tmp_path / "model-step-3").provenance["steps"] == 3
    assert names(own) == ["step-00000007"]


# --- errors


def test_a_full_disk_ends_the_run_and_the_training_checkpoint_stays(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    steps: list[int] = []
    counter = LambdaCallback(on_train_batch_end=lambda trainer, *_: steps.append(trainer.global_step))
    checkpoint = ResumeCheckpoint(str(tmp_path / "checkpoints"), keep=9)
    with pytest.raises(UserError, match=r"a model could not be written: .* free some space"):
        fit([counter, checkpoint, ExportModel(str(tmp_path / "model"), every_n_steps=1)])
    assert max(steps) == 2  # reported when the next one is due
    assert names(tmp_path) == ["checkpoints"]
    assert open_checkpoint(tmp_path / "checkpoints" / "step-00000001").provenance["steps"] == 1


def test_an_error_of_the_writer_ends_all_ranks(fit: Fit, tmp_path: Path) -> None:
    """Ranks that write nothing would otherwise wait for the first one for ever."""

    def run() -> str:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        shutil.disk_usage = lambda _: usage  # type: ignore[assignment, misc]  # in this process alone
        export = ExportModel(str(tmp_path / "model"), every_n_steps=1)
        with pytest.raises(UserError, match="a model could not be written") as error:
            fit([ResumeCheckpoint(str(tmp_path / "checkpoints")), export], strategy="ddp", devices=2)
        return str(error.value)

    first, second = on_ranks(2, run)
    assert first == second


def test_a_run_that_was_killed_before_its_export_only_exports(fit: Fit, tmp_path: Path) -> None:
    own = tmp_path / "checkpoints"
    fit([ResumeCheckpoint(str(own))], steps=3)
    last = own / "step-00000003"
    before = {path.name: path.stat().st_mtime_ns for path in last.iterdir()}
    (tmp_path / ".model.tmp").mkdir()
    trainer, _ = fit([ResumeCheckpoint(str(own)), ExportModel(str(tmp_path / "model"))], steps=3, resume=last)
    finish_export(trainer)
    assert {path.name: path.stat().st_mtime_ns for path in last.iterdir()} == before
    check_same(tmp_path / "model", last)
    # from before the kill
    assert open_checkpoint(tmp_path / "model").provenance["metric"]["name"] == "val/loss"
    assert names(tmp_path) == ["checkpoints", "model"]
    finish_export(trainer)  # nothing more
    # The model goes into another run's folder, which lacks such a checkpoint so far.
    callbacks_ = [ResumeCheckpoint(str(tmp_path / "b/checkpoints")), ExportModel(str(tmp_path / "b/model"))]
    trainer, _ = fit(callbacks_, steps=3, resume=last)
    finish_export(trainer)
    check_same(tmp_path / "b/model", last)


def test_an_intermediate_model_that_a_kill_prevented_is_written_on_resume(fit: Fit, tmp_path: Path) -> None:
    own = tmp_path / "checkpoints"
    fit([ResumeCheckpoint(str(own), every_n_steps=1, keep=9)], steps=3)
    for partial in (".model-step-2.tmp", ".model-step-1.replaced.tmp", ".model.tmp"):
        (tmp_path / partial).mkdir()
        (tmp_path / partial / "config.json").touch()
    export = ExportModel(str(tmp_path / "model"), every_n_steps=2)
    fit([ResumeCheckpoint(str(own), keep=9), export], steps=4, resume=own / "step-00000002")
    assert names(tmp_path) == ["checkpoints", "model", "model-step-2"]
    check_same(tmp_path / "model-step-2", own / "step-00000002")
    check_same(tmp_path / "model", own / "step-00000004")


# --- memory

CONSOLIDATE = """
import sys, torch
from pathlib import Path
from sphinx_pl.checkpoints.training import consolidate

def of(key):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024

before = of("VmRSS")
consolidate(Path(sys.argv[1]), Path(sys.argv[2]), torch.bfloat16)
print(of("VmHWM") - before)
"""


def write_large(folder: Path, config: SphinxConfig, processor: Processor, ranks: int) -> dict[str, torch.Tensor]:
    """Write 1.6 GB of weights in 24 tensors (views of the same random numbers) and as much
    optimizer state.
    """
    pool = torch.randn(2**24 + 1000)
    tensors = {f"t{number}": pool[number : number + 2**24] for number in range(24)}
    folder.mkdir()
    size = 2**24 // ranks
    for rank in range(ranks):
        pieces = [
            TensorShard(kind, name, rank * size, tensor[rank * size :][:size])
            for name, tensor in tensors.items()
            for kind in (WEIGHT, "exp_avg")
        ]
        write_shards(folder, rank, ranks, pieces)
    write_rest(folder, ranks, {name: [2**12, 2**12] for name in tensors}, {})
    describe(folder, config.to_dict(), processor.to_dict(), processor.tokenizer.path, {})
    return tensors


@pytest.mark.long
@pytest.mark.timeout(400)
def test_consolidating_holds_a_tensor_at_a_time(
    model_config: SphinxConfig, processor: Processor, tmp_path: Path
) -> None:
    tensors = write_large(tmp_path / "step-1", model_config, processor, ranks=8)
    process = subprocess.run(
        [sys.executable, "-c", CONSOLIDATE, str(tmp_path / "step-1"), str(tmp_path / "model")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    peak = int(process.stdout)
    whole, largest = 4 * 24 * 2**24, 4 * 2**24
    print(f"model {whole / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    # The limit allows for two tensors that are read and written, but for no page of a file.
    assert peak < 4 * largest
    assert peak < whole / 2
    model = open_checkpoint(tmp_path / "model")
    assert same_bits(model.tensor("t5").flatten(), tensors["t5"].bfloat16())
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole // 2
