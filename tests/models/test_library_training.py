"""A model with encoders of three libraries trains, is planned, exported, and leaves encoders out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file

from sphinx_pl.callbacks.export import ExportModel
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.tensors import encoder_of
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.generation.assistant import Assistant
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.models.vision import build_encoder
from sphinx_pl.planning.flops import TrainingFlops
from sphinx_pl.planning.memory import Run, Shape, micro_batches
from sphinx_pl.stages import Stage
from tests.models.test_library_encoders import mixed

PARTS = ["decoder", "projections", "lite", "dino"]
OPTIM = {"lr": 1e-3, "warmup": 0.0, "lr_scale": {"lite": 0.5}}


def sized_processor(processor: Processor, config: SphinxConfig) -> Processor:
    """The processor of a model with other images."""
    assert config.vision is not None
    sizes = {"tokens_per_image": config.tokens_per_image, "image_size": config.vision.image_size}
    return Processor(processor.config, processor.tokenizer, **sizes)


def loading(folder: Path) -> SphinxConfig:
    """The mixed model, whose open_clip encoder has a file."""
    config = mixed()
    assert config.vision is not None
    encoder = build_encoder(config.vision, "open_clip")
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    config.vision.encoders["open_clip"].load = str(folder / "encoder.safetensors")
    return config


def test_it_trains_and_its_checkpoint_comes_back(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    config = loading(tmp_path)
    torch.manual_seed(0)
    start = Stage(config, "test", PARTS, OPTIM, max_steps=2)
    start.configure_model()
    before = {name: value.clone() for name, value in start.sphinx.state_dict().items()}
    torch.manual_seed(0)
    stage = Stage(config, "test", PARTS, OPTIM, max_steps=2)
    sources = {
        "real": {"kind": "image_text", "path": f"{sample_data}/real/train-*.tar", "weight": 0.7},
        "text": {"kind": "text", "path": f"{sample_data}/text/train.jsonl", "weight": 0.3},
    }
    packing = {"row_length": 96, "micro_batch_rows": 2}
    module = DataModule(sized_processor(processor, config), sources, {}, packing, workers=0)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    export = ExportModel(str(tmp_path / "model"), leave_out_frozen=True)
    L.Trainer(**options, max_steps=2, max_epochs=-1, log_every_n_steps=1, callbacks=[export]).fit(stage, module)
    after = stage.sphinx.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {encoder_of(name) for name in moved} - {""} == {"lite", "dino"}
    assert not any("running" in name for name in moved)
    assert {group.get("lr_scale") for group in stage.optimizers().param_groups} == {0.5, 1.0}  # type: ignore[union-attr]

    written = {
        encoder_of(name) for shard in (tmp_path / "model").glob("model-*.safetensors") for name in load_file(shard)
    }
    assert written == {"", "lite", "dino", "siglip"}
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.model_config == config
    model = Assistant.load(tmp_path / "model", device="cpu").model
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name]), name
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().embed_images(pixels), stage.sphinx.eval().embed_images(pixels))


def test_it_is_planned() -> None:
    config = mixed()
    assert config.vision is not None
    encoders = config.vision.encoders
    flops = TrainingFlops(Sphinx(config))
    without = dataclasses.replace(config.vision, encoders={**encoders, "lite": None})
    less = TrainingFlops(Sphinx(dataclasses.replace(config, vision=without)))
    joined = 2 * config.vision.patch_tokens("none") * encoders["lite"].width * config.decoder.width
    assert flops.per_image - less.per_image == 3 * (encoders["lite"].measured.flops + joined)
    run = Run(("decoder", "projections"), "32-true", gpu=False)
    shape = Shape(rows=1, length=96, supervised=32.0, images=1.0)
    frozen, trained = (
        micro_batches(config, shape, dataclasses.replace(run, train_parts=parts)).peaks(1)
        for parts in (run.train_parts, tuple(PARTS))
    )
    assert sum(trained["head"].values()) > sum(frozen["head"].values())
