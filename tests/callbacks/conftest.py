"""A real but tiny run: all four encoders, the sample data, and a few optimizer steps of two
micro-batches on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.stages import Stage

PARTS = ["decoder", "projections", "clip", "convnext", "dinov2", "qformer"]
Fit = Callable[..., tuple[L.Trainer, Stage]]


@pytest.fixture
def datamodule(sample_data: Path, processor: Processor) -> DataModule:
    tasks = {
        "kind": "instructions",
        "path": str(sample_data / "instructions/train-scenes.json"),
        "questions_per_sample": 4,
    }
    text = {"kind": "text", "path": str(sample_data / "text/train.jsonl"), "weight": 0.3}
    return DataModule(
        processor,
        {"tasks": tasks, "text": text},
        {"text": {"kind": "text", "path": str(sample_data / "text/val.jsonl")}},
        {"row_length": 256, "micro_batch_rows": 2},
        workers=0,
        val_samples=4,
    )


@pytest.fixture
def test_sources(sample_data: Path) -> dict[str, dict[str, Any]]:
    return {"tasks": {"kind": "instructions", "path": str(sample_data / "instructions/val.json")}}


@pytest.fixture
def fit(datamodule: DataModule, model_config: SphinxConfig) -> Fit:
    """Return a function: `fit(callbacks, loggers, steps=4, train_parts=PARTS, resume=checkpoint,
    **trainer options)`.
    """

    def fit(
        callbacks: Sequence[L.Callback],
        loggers: Sequence[Any] = (),
        steps: int = 4,
        train_parts: Sequence[str] = PARTS,
        resume: Path | None = None,
        **options: Any,
    ) -> tuple[L.Trainer, Stage]:
        L.seed_everything(0, verbose=False)
        stage = Stage(
            model_config,
            "finetune",
            list(train_parts),
            {"lr": 1e-3, "warmup": 1},
            steps,
            val_names=datamodule.val_names,
        )
        stage.resumed = resume is not None
        settings = {
            "accelerator": "cpu",
            "max_steps": steps,
            "max_epochs": -1,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "val_check_interval": 2 * 2,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 2,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        trainer = L.Trainer(callbacks=list(callbacks), logger=list(loggers), **(settings | options))
        trainer.fit(stage, datamodule, ckpt_path=resume, weights_only=True)
        return trainer, stage

    return fit
