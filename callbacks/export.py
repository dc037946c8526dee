"""The run's result: a weights-only checkpoint that every other script loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from sphinx_pl.checkpoint.format import check_free, write_checkpoint
from sphinx_pl.checkpoint.provenance import provenance
from sphinx_pl.errors import UserError
from sphinx_pl.stages import Stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExportModel(L.Callback):
    """Writes `folder` when training ends (and every `every_n_steps`, if set, as `folder-step-N`).

    Args:
        folder: of the checkpoint: safetensors, config, tokenizer, provenance.
        dtype: of the stored weights.
        config: the file with the composed configuration that train.py keeps in the run folder, for the provenance.

    Raises:
        UserError: before training, if `folder` holds something else than a checkpoint.
    """

    def __init__(self, folder: str, dtype: str = "float32", every_n_steps: int = 0, config: str | None = None) -> None:
        if dtype not in DTYPES:
            raise UserError(f"callbacks.export.dtype='{dtype}' must be one of {', '.join(DTYPES)}")
        self.folder = Path(folder)
        self.dtype = DTYPES[dtype]
        self.every_n_steps = every_n_steps
        self.config = Path(config) if config else None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_free(self.folder, overwrite=True)  # now, not when all the training is done

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        batch = args[1]
        if self.every_n_steps and batch.window_end and trainer.global_step % self.every_n_steps == 0:
            self.export(trainer, pl_module, self.folder.with_name(f"{self.folder.name}-step-{trainer.global_step}"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.export(trainer, pl_module, self.folder)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def export(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        assert isinstance(pl_module, Stage)
        processor = trainer.datamodule.processor
        config: Any = OmegaConf.to_container(OmegaConf.load(self.config)) if self.config else None
        write_checkpoint(
            folder,
            pl_module.sphinx.state_dict(),
            model=pl_module.config.to_dict(),
            processor=processor.to_dict(),
            tokenizer_file=processor.tokenizer.path,
            provenance=provenance(stage=pl_module.name, config=config, parents=pl_module.parents)
            | {"steps": trainer.global_step},
            dtype=self.dtype,
            overwrite=True,
        )
