"""A stage's loss, its steps and what it trains; on the real model, made tiny."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import save_file

from sphinx_pl.callbacks.export import ExportModel
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import build_reader
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.schema import IGNORE, Record
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.stages import Stage
from sphinx_pl.utils.errors import UserError
from tests.conftest import tiny_model

ALL = ["decoder", "projections", "clip", "convnext", "dinov2", "qformer"]
OPTIM = {"lr": 1e-3, "warmup": 0.0, "weight_decay": 0.0}


def datamodule(processor: Processor, folder: Path, rows: int = 4, text: float = 0.3, **packing: Any) -> DataModule:
    sources = {
        "real": {"kind": "image_text", "path": f"{folder}/real/train-*.tar", "weight": 0.7},
        "text": {"kind": "text", "path": f"{folder}/text/train.jsonl", "weight": text},
    }
    val = {
        "real": {"kind": "image_text", "path": f"{folder}/real/val-*.tar"},
        "text": {"kind": "text", "path": f"{folder}/text/val.jsonl"},
    }
    return DataModule(
        processor, sources, val, {"row_length": 96, "micro_batch_rows": rows} | packing, workers=0, val_samples=8
    )


def trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_checkpointing": False, "enable_model_summary": False, "max_epochs": -1}
    defaults |= {
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**defaults | options)


def fit(processor: Processor, folder: Path, tmp_path: Path, rows: int, accumulate: int, weighting: str) -> Stage:
    torch.manual_seed(0)
    stage = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=3, val_names=["real", "text"])
    # Unlike Adam, plain SGD does not hide a loss that is wrong by a factor.
    stage.configure_optimizers = lambda: torch.optim.SGD(stage.parameters(), lr=0.1)  # type: ignore[method-assign]
    data = datamodule(processor, folder, rows, weighting=weighting)
    trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate).fit(stage, data)
    return stage


@pytest.mark.parametrize("weights", [{}, {"real": 0.75, "text": 0.25}, {"real": 0.0, "text": 1.0}])
def test_the_held_out_loss_is_weighted(
    processor: Processor, sample_data: Path, tmp_path: Path, weights: dict[str, float]
) -> None:
    torch.manual_seed(0)
    stage = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=1, val_names=["real", "text"])
    stage.val_weights = weights
    trainer(tmp_path, limit_val_batches=1.0).validate(stage, datamodule(processor, sample_data), verbose=False)
    losses = {name: stage.last_value(f"val/loss/{name}") for name in ("real", "text")}
    assert losses["real"] != losses["text"]
    expected = sum((weights or {"real": 0.5, "text": 0.5})[name] * losses[name] for name in losses)
    assert stage.last_value("val/loss") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weighting", ["token", "sqrt"])
def test_an_accumulated_step_updates_as_one_batch_does(
    processor: Processor, sample_data: Path, tmp_path: Path, weighting: str
) -> None:
    whole = fit(processor, sample_data, tmp_path, rows=8, accumulate=1, weighting=weighting)
    parts = fit(processor, sample_data, tmp_path, rows=2, accumulate=4, weighting=weighting)
    start = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=3)
    torch.manual_seed(0)
    start.configure_model()
    moved = 0.0
    for (name, a), b, c in zip(whole.named_parameters(), parts.parameters(), start.parameters(), strict=True):
        step = (a - c).detach().abs().max()
        moved = max(moved, step.item())
        assert (a - b).abs().max() <= 1e-3 * step + 1e-7, name
    assert moved > 1e-3


def test_only_the_chosen_parts_move(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stage = Stage(tiny_model(), "test", ["decoder", "projections"], OPTIM, max_steps=2, val_names=["real", "text"])
    stage.configure_model()
    before = copy.deepcopy(stage.sphinx.state_dict())
    trainer(tmp_path, max_steps=2).fit(stage, datamodule(processor, sample_data))
    for name, value in stage.sphinx.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved != (".towers." in name), name
    assert not any(module.training for encoder in stage.sphinx.mixer.towers.values() for module in encoder.modules())


def test_pretraining_without_text_is_refused(processor: Processor, sample_data: Path) -> None:
    datamodule(processor, sample_data).check(text_required=True)
    with pytest.raises(UserError, match="text-only"):
        datamodule(processor, sample_data, text=0.0).check(text_required=True)


def test_an_exported_stage_starts_the_next_one_and_another_model_is_refused(
    processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    stage = Stage(tiny_model(), "first", ALL, OPTIM, max_steps=1, val_names=["real", "text"])
    out = tmp_path / "model"
    trainer(tmp_path, max_steps=1, callbacks=[ExportModel(str(out))]).fit(stage, datamodule(processor, sample_data))
    following = Stage(tiny_model(), "second", ALL, OPTIM, max_steps=1, init_from=str(out))
    following.configure_model()
    for a, b in zip(stage.parameters(), following.parameters(), strict=True):
        assert torch.equal(a, b)
    assert open_checkpoint(out).provenance["steps"] == 1
    config = tiny_model()
    config.decoder.layers = 1
    with pytest.raises(UserError, match=r"model\.decoder\.layers is 2 and 1"):
        Stage(config, "second", ALL, OPTIM, max_steps=1, init_from=str(out)).configure_model()


def test_released_weights_are_checked_before_anything_is_built(
    processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_model()
    first = Sphinx(config)
    weights, clip = tmp_path / "weights", tmp_path / "clip.safetensors"
    path = Path(processor.tokenizer.path)
    write_checkpoint(weights, first.state_dict(), config.to_dict(), processor.to_dict(), path, {"stage": None})
    assert first.mixer is not None
    save_file(first.mixer.towers["clip"].state_dict(), clip)

    config = tiny_model()
    assert config.vision is not None
    encoders = config.vision.encoders
    config.decoder.load, encoders["clip"].load = str(weights), str(clip)
    stage = Stage(config, "second", ALL, OPTIM, max_steps=1)
    stage.configure_model()
    for name, value in first.state_dict().items():
        if name.startswith(("decoder.", "mixer.towers.clip.")):
            assert torch.equal(stage.sphinx.state_dict()[name], value), name

    encoders["dinov2"].load = str(clip)
    with pytest.raises(UserError, match=r"model\.vision\.encoders\.dinov2\.load=.*clip\.safetensors"):
        stage.check()
    config.decoder.rope_theta = 500.0  # which no shape shows
    with pytest.raises(UserError, match=r"another decoder: model\.decoder\.rope_theta is 10000\.0 and 500\.0"):
        stage.check()

    config = tiny_model()
    assert config.vision is not None
    clip = config.vision.encoders["clip"]
    clip.quick_gelu = not clip.quick_gelu
    Stage(config, "third", ALL, OPTIM, max_steps=1, init_from=str(weights)).check(processor)
    assert "model.vision.encoders.clip.quick_gelu" in caplog.text


def records_by_task(folder: Path) -> dict[str, list[Record]]:
    source = build_reader("instructions", "tasks", str(folder / "instructions/train-*.json"))
    records: dict[str, list[Record]] = {name: [] for name in TASKS}
    for i in range(len(source)):
        record = source.record(i)
        if len(records[record.task]) < 2:
            records[record.task].append(record)
    captions = build_reader("image_text", "real", str(folder / "real/train-*.tar"))
    records["caption"] = [captions.record(0), captions.record(1)]
    text = build_reader("text", "text", str(folder / "text/train.jsonl"))
    records["text"] = [text.record(0), text.record(1)]
    return records


ALIKE = {"yes_no", "detailed_answer", "grounded_vqa", "detection_all", "ocr_text", "relation_detection"}
ALIKE |= {"question_generation"}
"""Tasks whose samples have the form of another task's."""


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ALIKE])
def test_overfitting_one_batch_drives_the_loss_to_zero(task: str, processor: Processor, sample_data: Path) -> None:
    records = records_by_task(sample_data)[task]
    assert len(records) == 2, f"the sample data has no two records of {task}"
    samples = [processor.sample(record, "s") for record in records]
    collator = Collator(max(sample.length for sample in samples), processor.image_size)
    batch = collator([[sample] for sample in samples])
    assert (batch.labels != IGNORE).sum() > 0
    torch.manual_seed(0)
    model = Sphinx(tiny_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(150):
        losses = model.token_losses(batch)
        loss = losses.nll.mean() + losses.extra
        if float(loss) < 0.05:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss) < 0.05
