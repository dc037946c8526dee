"""A stage of the recipe: builds the model where it will live, takes packed batches, one loss for the global batch.

Pretraining on real pairs, on synthetic captions and finetuning (SPHINX, section 3.1) differ in what trains, on which
mixture, from which weights and how long: all of it configuration, so there is one class.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from sphinx_pl.checkpoint.format import differences, open_checkpoint
from sphinx_pl.checkpoint.provenance import hash_file
from sphinx_pl.checkpoint.towers import check_pretrained, load_pretrained
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.record import Batch
from sphinx_pl.errors import UserError, suggest
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.decoder import Decoder
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.models.towers import Tower, build_towers
from sphinx_pl.stages.optim import OptimConfig, build_adamw, warmup_cosine
from sphinx_pl.typed import build

log = logging.getLogger(__name__)

_FREE = (
    "model.decoder.max_positions",
    "model.decoder.balance_weight",
    "model.vision.clip.quick_gelu",
    "model.vision.half_resize",
)
"""What a run may choose anew for weights that were trained with another value."""


class Stage(L.LightningModule):
    """Trains `train_parts` of a model with next-token prediction on the supervised positions.

    Args:
        model: the architecture.
        name: of the stage, in logs and provenance.
        train_parts: parts that train (`Sphinx.parts()`); every other part is frozen, in eval mode, without gradients.
        optim: see `OptimConfig`.
        max_steps: optimizer steps of the whole stage, which the learning rate falls over; a trainer may stop earlier.
        init_from: checkpoint folder whose weights this stage starts from; null starts from random weights and the
            towers' own `load` entries.
        val_names: names of the held-out sources, in the order of the validation loaders.
    """

    def __init__(
        self,
        model: SphinxConfig,
        name: str,
        train_parts: list[str],
        optim: dict[str, Any],
        max_steps: int,
        init_from: str | None = None,
        val_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.config = model
        self.name = name
        self.train_parts = list(train_parts)
        self.optim = build(OptimConfig, optim, "stage.optim")
        self.max_steps = max_steps
        self.init_from = init_from
        self.val_names = val_names or []
        self.model: Sphinx | None = None
        self.parents: list[dict[str, Any]] = []
        """Identities of the checkpoints that the weights come from."""
        # Sums of nll and targets per task and per source since the last log.
        self._sums: Tensor | None = None
        self._val_sums: Tensor | None = None
        self.resumed = False
        """The weights come from a resumable checkpoint, so that neither `init_from` nor towers are read again."""
        self.validated_at = -1
        """Optimizer steps behind the last held-out losses."""
        self._counted: list[str] = []
        """What the sums are of: task/<name>, then source/<name>."""

    # -- building ---------------------------------------------------------------------------------------------------

    def check(self, processor: Processor | None = None) -> None:
        """Whether this stage can start, without building anything.

        Args:
            processor: of this run, to compare with the one that `init_from` was trained with.

        Raises:
            UserError: an unknown part, no checkpoint at `init_from` or one of another model or tokenizer, or weights to
                start from that are not there or not this model's.
        """
        vision = self.config.vision
        parts = ["decoder", *(["projections", *vision.towers] if vision else [])]
        if not self.train_parts:
            raise UserError(f"stage.train_parts is empty, so nothing would train: choose among {', '.join(parts)}")
        for part in self.train_parts:
            if part not in parts:
                raise UserError(f"stage.train_parts: no part '{part}' in this model; {suggest(part, parts)}")
        for part in self.optim.lr_scale:
            if part not in parts:
                raise UserError(f"stage.optim.lr_scale: no part '{part}' in this model; {suggest(part, parts)}")
        if self.resumed:
            return
        if not self.init_from:
            self._check_pretrained()
            return
        checkpoint = open_checkpoint(self.init_from)
        differing = differences(checkpoint.model_config.to_dict(), self.config.to_dict(), "model")
        for difference in differing:
            if difference.startswith(_FREE):
                log.warning("%s in stage.init_from=%s and in this run", difference, self.init_from)
            else:
                raise UserError(
                    f"stage.init_from={self.init_from} holds another model, {difference}: "
                    "compose the model that it was made with"
                )
        if processor is None:
            return
        if hash_file(checkpoint.tokenizer_file) != hash_file(processor.tokenizer.path):
            raise UserError(
                f"stage.init_from={self.init_from} was trained with another tokenizer than {processor.tokenizer.path}: "
                f"set data.tokenizer={checkpoint.tokenizer_file}"
            )
        for difference in differences(checkpoint.processor, processor.to_dict(), "data.processor"):
            log.warning("%s in stage.init_from=%s and in this run", difference, self.init_from)

    def _check_pretrained(self) -> None:
        vision, decoder = self.config.vision, self.config.decoder
        with torch.device("meta"):
            if decoder.load:
                checkpoint = open_checkpoint(decoder.load)
                checkpoint.check(Decoder(decoder), "decoder.")
                # Shapes don't show these: one matrix is 32 heads of 128 or 64 of 64.
                differing = differences(asdict(checkpoint.model_config.decoder), asdict(decoder), "model.decoder")
                if differing := [difference for difference in differing if not difference.startswith(_FREE)]:
                    raise UserError(f"model.decoder.load={decoder.load} holds another decoder: {differing[0]} here")
            if vision and any(getattr(vision, key).load for key in vision.towers):
                for key, tower in build_towers(vision).items():
                    if source := getattr(vision, key).load:
                        check_pretrained(cast(Tower, tower), source)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.check()
        model = Sphinx(self.config)
        if self.init_from and not self.resumed:
            checkpoint = open_checkpoint(self.init_from)
            checkpoint.load_into(model)
            self.parents = [checkpoint.identity()]
        elif not self.resumed:
            self._load_pretrained(model)
        model.freeze([part for part in model.parts() if part not in self.train_parts])
        self.model = model

    def _load_pretrained(self, model: Sphinx) -> None:
        if source := self.config.decoder.load:
            open_checkpoint(source).load_into(model.decoder, "decoder.")
        for key, tower in model.mixer.towers.items() if model.mixer is not None else ():
            source = getattr(self.config.vision, key).load
            if source:
                load_pretrained(cast(Tower, tower), source)

    @property
    def sphinx(self) -> Sphinx:
        assert self.model is not None, "configure_model() has not run"
        return self.model

    def configure_optimizers(self) -> Any:
        optimizer = build_adamw(self.sphinx.part_parameters(), self.optim)
        schedule = warmup_cosine(self.optim, self.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
        self._count(batch, losses.nll.detach(), losses.index)
        loss: Tensor = (losses.nll * weights).sum() * scale + losses.extra
        return loss

    def _count(self, batch: Batch, nll: Tensor, index: Tensor) -> None:
        counted = [*(f"task/{name}" for name in batch.tasks), *(f"source/{name}" for name in batch.sources)]
        if self._sums is None or self._counted != counted:  # a run may go on with other sources
            self._counted, self._sums = counted, torch.zeros(2, len(counted), dtype=torch.float64)
        sums = self._sums = self._sums.to(nll.device)
        values = torch.stack([nll, torch.ones_like(nll)]).double()
        sums.index_add_(1, batch.task_ids.flatten()[index].long(), values)
        if batch.source_ids is not None:
            sums.index_add_(1, batch.source_ids.flatten()[index].long() + len(batch.tasks), values)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sums"] = {"counted": self._counted, "values": self._sums}
        checkpoint["parents"] = self.parents

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._counted, self._sums = checkpoint["sums"]["counted"], checkpoint["sums"]["values"]
        self.parents = checkpoint["parents"]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the global norm, and log the step: here its loss, gradients and learning rate are all known."""
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters() if p.grad is not None], gradient_clip_val or float("inf")
        )
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            group = optimizer.param_groups[0]
            self._log_steps(float(norm), float(group["lr"] / group.get("lr_scale", 1.0)))

    def _log_steps(self, gradient_norm: float, lr: float) -> None:
        """A row for the steps since the last one. `step` counts those that were finished before this one."""
        assert self._sums is not None
        nll, count = self._reduced(self._sums).tolist()
        self._sums = None
        rows = list(zip(self._counted, nll, count, strict=True))
        of_tasks = [row for row in rows if row[0].startswith("task/")]  # every target is of one task
        loss = sum(row[1] for row in of_tasks) / max(sum(row[2] for row in of_tasks), 1)
        metrics = {"train/loss": loss, "train/grad_norm": gradient_norm, "train/lr": lr}
        for name, total, n in rows:
            if n:
                metrics[f"train/loss_{name}"] = total / n
                metrics[f"train/targets_{name}"] = n
        self.log_now(metrics, self.global_step)

    def log_now(self, metrics: dict[str, float], step: int) -> None:
        """Numbers that are the same on all ranks: to the loggers, and to `trainer.callback_metrics` for callbacks.

        Lightning's `log` would take up to a millisecond for each of them (docs/benchmarks.md), and hand them on only
        after the checkpoint of this step is written, so that a run that is killed then would miss the row.
        """
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def _reduced(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    # -- held-out losses --------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._val_sums = torch.zeros(3, max(1, len(self.val_names)), device=self.device, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        losses = self.sphinx.token_losses(batch)
        assert self._val_sums is not None
        self._val_sums[0, dataloader_idx] += losses.nll.double().sum()
        self._val_sums[1, dataloader_idx] += losses.nll.numel()
        self._val_sums[2, dataloader_idx] += sum(n for key, n in batch.counters.items() if key.startswith("skipped/"))

    def on_validation_epoch_end(self) -> None:
        assert self._val_sums is not None
        nll, count, unreadable = self._reduced(self._val_sums).tolist()
        metrics: dict[str, float] = {}
        for i, name in enumerate(self.val_names):
            if not count[i]:
                raise UserError(
                    f"data.val_sources.{name}: no target is left to measure ({unreadable[i]:.0f} images could not be "
                    "read): check the paths of its images"
                )
            metrics[f"val/loss/{name}"] = nll[i] / count[i]
        metrics["val/loss"] = sum(metrics.values()) / max(len(metrics), 1)
        metrics |= {f"val/unreadable/{name}": n for name, n in zip(self.val_names, unreadable, strict=False) if n}
        self.log_dict(metrics)
        self.validated_at = self.global_step
