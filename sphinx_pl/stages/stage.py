"""A stage of the recipe: builds the model where it will live, takes packed batches, one loss for the global batch.

Pretraining on real pairs, on synthetic captions and finetuning (SPHINX, section 3.1) differ in what trains, on which
mixture, from which weights and how long: all of it configuration, so there is one class.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from sphinx_pl.checkpoint.format import open_checkpoint
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.record import Batch
from sphinx_pl.errors import UserError, suggest
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.models.towers import Tower, load_pretrained
from sphinx_pl.stages.optim import OptimConfig, build_adamw, warmup_cosine

log = logging.getLogger(__name__)


class Stage(L.LightningModule):
    """Trains `train_parts` of a model with next-token prediction on the supervised positions.

    Args:
        model: the architecture.
        name: of the stage, in logs and provenance.
        train_parts: parts that train (`Sphinx.parts()`); every other part is frozen, in eval mode, without gradients.
        optim: see `OptimConfig`.
        init_from: checkpoint folder whose weights this stage starts from; null starts from random weights and the
            towers' own `load` entries.
        text_required: refuse a mixture without text-only data, which keeps the language ability. The planner puts text
            in every step where the mixture has it. Off only to measure what the text is good for.
        val_names: names of the held-out sources, in the order of the validation loaders.
    """

    def __init__(
        self,
        model: SphinxConfig,
        name: str,
        train_parts: list[str],
        optim: dict[str, Any],
        init_from: str | None = None,
        text_required: bool = False,
        val_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.config = model
        self.name = name
        self.train_parts = list(train_parts)
        self.optim = OptimConfig(**optim)
        self.init_from = init_from
        self.text_required = text_required
        self.val_names = val_names or []
        self.model: Sphinx | None = None
        self.parents: list[dict[str, Any]] = []
        """Identities of the checkpoints that the weights come from."""
        # Sums since the last log, per task: weighted and plain. Not state: a resumed run starts a new log line.
        self._task_sums: Tensor | None = None
        self._val_sums: Tensor | None = None
        self._tasks: list[str] = []

    # -- building ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.model is not None:
            return
        model = Sphinx(self.config)
        if self.init_from:
            checkpoint = open_checkpoint(Path(self.init_from))
            if checkpoint.model_config.to_dict() | {"name": ""} != self.config.to_dict() | {"name": ""}:
                raise UserError(
                    f"stage.init_from={self.init_from} holds a '{checkpoint.model_config.name}' model of other sizes "
                    f"than model '{self.config.name}': compose the model that the checkpoint was made with"
                )
            checkpoint.load_into(model)
            self.parents = [checkpoint.identity()]
        else:
            self._load_towers(model)
        parts = model.parts()
        for part in self.train_parts:
            if part not in parts:
                raise UserError(f"stage.train_parts: no part '{part}' in this model; {suggest(part, parts)}")
        model.freeze([part for part in parts if part not in self.train_parts])
        self.model = model

    def _load_towers(self, model: Sphinx) -> None:
        for key, tower in model.mixer.towers.items() if model.mixer is not None else ():
            source = getattr(self.config.vision, key).load
            if source:
                load_pretrained(cast(Tower, tower), source)

    @property
    def sphinx(self) -> Sphinx:
        assert self.model is not None, "configure_model() has not run"
        return self.model

    def configure_optimizers(self) -> Any:
        optimizer = build_adamw(self, self.optim)
        schedule = warmup_cosine(self.optim, int(self.trainer.max_steps))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        datamodule: DataModule = self.trainer.datamodule
        if self.text_required and not datamodule.has_text:
            raise UserError(
                "data.sources has no text-only source, which pretraining needs in every step to keep the language "
                "ability: add one, or set stage.text_required=false"
            )

    # -- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's part of the mean over all targets of the step.

        Lightning divides by the number of micro-batches and DDP by the number of ranks; both are undone here, so
        that every target of the global batch weighs the same, however the targets fell into micro-batches.
        """
        losses = self.sphinx.token_losses(batch)
        weights = batch.weights.flatten()[losses.index]
        total = batch.input_ids.new_tensor(batch.window_weight, dtype=torch.float32)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / total.clamp(min=1e-8)
        self._count(batch, losses.nll.detach(), losses.index, weights)
        loss: Tensor = (losses.nll * weights).sum() * scale + losses.anchor
        return loss

    def _count(self, batch: Batch, nll: Tensor, index: Tensor, weights: Tensor) -> None:
        self._tasks = batch.tasks
        if self._task_sums is None:
            self._task_sums = torch.zeros(3, len(batch.tasks), device=nll.device, dtype=torch.float64)
        tasks = batch.task_ids.flatten()[index].long()
        rows = torch.stack([nll, torch.ones_like(nll), nll * weights]).double()
        self._task_sums.index_add_(1, tasks, rows)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not batch.window_end or self.global_step % self.trainer.log_every_n_steps:
            return
        assert self._task_sums is not None
        sums = self._reduced(self._task_sums)
        self._task_sums = None
        nll, count, _ = sums.tolist()
        metrics = {"train/loss": sum(nll) / max(sum(count), 1)}
        for task, total, n in zip(self._tasks, nll, count, strict=True):
            if n:
                metrics[f"train/loss_task/{task}"] = total / n
                metrics[f"train/targets/{task}"] = n
        metrics["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict(metrics)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters() if p.grad is not None], gradient_clip_val or float("inf")
        )
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/grad_norm", norm)

    def _reduced(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    # -- held-out losses --------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._val_sums = torch.zeros(2, max(1, len(self.val_names)), device=self.device, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        losses = self.sphinx.token_losses(batch)
        assert self._val_sums is not None
        self._val_sums[0, dataloader_idx] += losses.nll.double().sum()
        self._val_sums[1, dataloader_idx] += losses.nll.numel()

    def on_validation_epoch_end(self) -> None:
        assert self._val_sums is not None
        nll, count = self._reduced(self._val_sums).tolist()
        metrics = {f"val/loss/{name}": nll[i] / max(count[i], 1) for i, name in enumerate(self.val_names)}
        metrics["val/loss"] = sum(metrics.values()) / max(len(metrics), 1)
        self.log_dict(metrics)
