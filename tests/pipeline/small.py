"""The demo's recipe with a model and runs that take seconds, as overrides of the pipeline."""

from __future__ import annotations

from pathlib import Path

from tests.cli.test_train import SMALL


def small_demo(folder: Path, data: Path) -> list[str]:
    """Return five steps on existing sample data: two trainings, their mixture, a finetune and its
    evaluation.
    """
    return [
        "experiment=demo",
        f"output_dir={folder}",
        f"data_root={data}",
        "steps.data=null",
        "steps.pretrain_synthetic_notext=null",
        "limit=1",
        *(f"train:{override}" for override in SMALL),
        "train:stage.max_steps=2",
        "mix:curve=2",
        "mix:data.packing.micro_batch_rows=2",
        "mix:data.val_samples=4",
        "evaluate:shuffled=false",
        "evaluate:constant=20",
    ]
