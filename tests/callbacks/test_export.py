"""The run's result: what every other script loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from safetensors import safe_open

from callbacks.export import ExportModel
from sphinx_pl.checkpoint.format import open_checkpoint
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.errors import UserError
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx

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
    assert not (folder / "leftover.txt").exists()  # the run before is replaced as a whole

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
    found: dict[str, torch.Tensor] = {}
    for shard in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    for name, value in stage.sphinx.state_dict().items():
        if name in found:
            assert torch.equal(found[name], value.bfloat16()), name
    assert len(found) > 50
    assert open_checkpoint(tmp_path / "model-step-4").provenance["steps"] == 4
    # Written while training went on: the steps differ from each other and from the end.
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
