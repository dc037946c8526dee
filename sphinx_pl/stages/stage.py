"""A stage of the recipe: it builds the model in place, takes packed batches, and has one loss for
the global batch.

Pretraining on real pairs, on synthetic captions, and finetuning (SPHINX, section 3.1) differ in the
parts that train, the mixture, the initial weights and the length. All of these are configuration,
so one class is enough.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from sphinx_pl.checkpoints.encoders import check_pretrained
from sphinx_pl.checkpoints.format import Checkpoint, differences, open_checkpoint
from sphinx_pl.checkpoints.grown import grown
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import Batch
from sphinx_pl.distributed.checkpointing import TrainingCheckpointIO, group_names, options_of
from sphinx_pl.distributed.sharded import Sharded
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.decoder import CHECKPOINTING, Decoder
from sphinx_pl.models.placement import OneDevice, Placement
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.models.vision import build_encoders
from sphinx_pl.runtime.collectives import of_all_ranks
from sphinx_pl.stages import gradients
from sphinx_pl.stages.build import build_model
from sphinx_pl.stages.checks import check_resume, check_same_model
from sphinx_pl.stages.optim import OptimConfig, build_optimizer, warmup_cosine
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError, suggest

log = logging.getLogger(__name__)


def _free(config: SphinxConfig) -> tuple[str, ...]:
    """Return the model keys that a run may set differently from the run that trained the weights."""
    encoders = config.vision.encoders.values() if config.vision else ()
    return (
        "model.decoder.max_positions",
        "model.decoder.balance_weight",
        "model.vision.half_resize",
        *(f"{encoder.section}.{key}" for encoder in encoders for key in encoder.free),
    )


OTHERS_KEYS = ("global_batch_rows", "accumulate", "clip", "val_every", "text_required")
"""Keys of conf/stage that belong to the trainer and the data."""


class NonFiniteError(UserError):
    """Training failed: too many consecutive steps had gradients that were not finite.

    Args:
        first: optimizer steps before the first of them. The weights after these steps may be the
            cause.
    """

    def __init__(self, message: str, first: int) -> None:
        super().__init__(message)
        self.first = first


def parts_of(config: SphinxConfig) -> list[str]:
    """Return the names of the parts that a model of this configuration has."""
    return ["decoder", *(["projections", *config.vision.encoders] if config.vision else [])]


class Stage(L.LightningModule):
    """Trains `train_parts` of a model with next-token prediction on the supervised positions.

    Args:
        model: the architecture.
        name: the name of the stage, in logs and provenance.
        train_parts: parts that train (`Sphinx.parts()`). All other parts are frozen, in eval mode,
            without gradients.
        optim: see `OptimConfig`.
        max_steps: optimizer steps of the whole stage, over which the learning rate falls. A trainer
            may stop earlier.
        init_from: the checkpoint folder with the initial weights. null starts from random weights
            and the encoders' own `load` entries.
        val_names: names of the held-out sources, in the order of the validation loaders.
        checkpointing: recomputes activations of the decoder, which saves memory; see `Decoder`.
        max_nonfinite: consecutive steps with gradients that are not finite, before the run stops.
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
        checkpointing: str = "none",
        max_nonfinite: int = 10,
    ) -> None:
        super().__init__()
        self.config = model
        self.name = name
        self.train_parts = list(train_parts)
        self.optim = build(OptimConfig, optim, "stage.optim")
        self.max_steps = max_steps
        self.init_from = init_from
        self.val_names = val_names or []
        self.val_weights: dict[str, float] = {}
        """The weight of each held-out source in `val/loss`. {} weighs all alike."""
        self.checkpointing = checkpointing
        self.max_nonfinite = max_nonfinite
        self.model: Sphinx | None = None
        self.parents: list[dict[str, Any]] = []
        """Identities of the checkpoints that the weights come from."""
        # Sums of nll and targets per task and per source since the last log.
        self._sums: Tensor | None = None
        self._val_sums: Tensor | None = None
        self._options: list[dict[str, Any]] = []
        """The configured options of the optimizer's groups."""
        self.resumed = False
        """Whether the weights come from a training checkpoint, so that neither `init_from` nor the
        encoders are read again."""
        self.validated_at = -1
        """Optimizer steps before the last held-out losses."""
        # The micro-batches of the current step, with their losses and the positions of these.
        self._micro_batches: list[tuple[Batch, Tensor, Tensor]] = []
        self.nonfinite_steps = 0
        """Skipped steps, whose gradients were not finite."""
        self._nonfinite_in_a_row = 0
        self._tokens = 0
        """The size of the run's tokenizer, as far as `check` knows it."""
        self._logged: dict[str, float] = {}
        """Values that were last logged before the checkpoint that this run resumes from."""
        self._counted: list[str] = []
        """Names of the sums: task/<name>, then source/<name>."""

    # -- building ----------------------------------------------------------------------------------

    def check(self, processor: Processor | None = None, strategy: Any = None, resume: Path | None = None) -> None:
        """Check that this stage can start, without building anything.

        Args:
            processor: the processor of this run, which is compared with the one that the weights
                were trained with.
            strategy: the trainer's strategy.
            resume: the training checkpoint to resume from, whose optimizer state must match as
                well.

        Raises:
            UserError: a part is unknown. Or initial weights are missing, or belong to another model
                or tokenizer. Or the optimizer does not match `resume` or `strategy`.
        """
        parts, free = parts_of(self.config), _free(self.config)
        self._tokens = processor.tokenizer.vocab_size if processor else self._tokens
        if self.checkpointing not in CHECKPOINTING:
            raise UserError(
                f"stage.checkpointing={self.checkpointing}: {suggest(self.checkpointing, list(CHECKPOINTING))}"
            )
        if not self.train_parts:
            raise UserError(f"stage.train_parts is empty, so nothing would train: choose among {', '.join(parts)}")
        for part in self.train_parts:
            if part not in parts:
                raise UserError(f"stage.train_parts: no part '{part}' in this model; {suggest(part, parts)}")
        for part in self.optim.lr_scale:
            if part not in parts:
                raise UserError(f"stage.optim.lr_scale: no part '{part}' in this model; {suggest(part, parts)}")
        if isinstance(strategy, Sharded) and strategy.bf16_masters and self.optim.moments != "bf16":
            raise UserError(
                "trainer.strategy.masters=bf16 would lose updates that are small beside a weight: also set "
                "stage.optim.moments=bf16, whose optimizer rounds stochastically"
            )
        if resume is not None:
            check_resume(resume, self.config, self.optim, self.train_parts, parts, processor, free)
        elif self.resumed:
            return
        elif self.init_from:
            try:
                checkpoint = self._grown(self.init_from)
            except UserError as error:
                raise UserError(f"stage.init_from={self.init_from}: {error}") from None
            check_same_model(checkpoint, self.config, processor, f"stage.init_from={self.init_from}", free)
        else:
            self._check_pretrained()

    def _grown(self, path: str) -> Checkpoint:
        """The checkpoint at `path`, with rows for tokens that its vocabulary has no room for."""
        checkpoint = open_checkpoint(path)
        room = checkpoint.model_config.decoder.vocab_size
        return grown(checkpoint, self.config.decoder.vocab_size) if self._tokens > room else checkpoint

    def _check_pretrained(self) -> None:
        vision, decoder, free = self.config.vision, self.config.decoder, _free(self.config)
        with torch.device("meta"):
            if decoder.load:
                checkpoint = self._grown(decoder.load)
                checkpoint.check(Decoder(decoder), "decoder.")
                # Shapes do not reveal these values: one matrix has 32 heads of 128 or 64 of 64.
                differing = differences(asdict(checkpoint.model_config.decoder), asdict(decoder), "model.decoder")
                if differing := [difference for difference in differing if not difference.startswith(free)]:
                    raise UserError(f"model.decoder.load={decoder.load} holds another decoder: {differing[0]} here")
            if vision and any(config.load for config in vision.encoders.values()):
                for encoder in build_encoders(vision).values():
                    if encoder.config.load:
                        check_pretrained(encoder, encoder.config.load)

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, Sharded) and type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = TrainingCheckpointIO()

    def configure_model(self) -> None:
        if self.model is not None:
            return
        strategy = self._trainer.strategy if self._trainer is not None else None
        self.check(strategy=strategy)
        placement: Placement = strategy.placement() if isinstance(strategy, Sharded) else self._one_device(strategy)
        weights = self._grown(self.init_from) if self.init_from and not self.resumed else None
        frozen = [part for part in parts_of(self.config) if part not in self.train_parts]
        self.model = build_model(self.config, frozen, placement, weights, self.resumed)
        self.model.decoder.checkpointing = self.checkpointing
        if weights is not None and placement.reads:
            self.parents = [weights.identity()]

    @staticmethod
    def _one_device(strategy: Any) -> OneDevice:
        """Return a placement on one device.

        DDP copies the first rank's weights, so they are read only once.
        """
        if strategy is None:
            return OneDevice()
        return OneDevice(strategy.root_device, reads=strategy.is_global_zero or not isinstance(strategy, DDPStrategy))

    @property
    def sphinx(self) -> Sphinx:
        assert self.model is not None, "configure_model() has not run"
        return self.model

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.sphinx.part_parameters(), self.optim)
        self._options = options_of(optimizer.param_groups)
        schedule = warmup_cosine(self.optim, self.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- training ----------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Apply the learning rate, decay and other options of this run's configuration to a resumed
        run.

        The checkpoint only tells how far the run is.
        """
        if not self.resumed:
            return
        [optimizer], [config] = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        scheduler: Any = config.scheduler
        factor = warmup_cosine(self.optim, self.max_steps)(scheduler.last_epoch)
        scheduler.base_lrs = [options["lr"] for options in self._options]
        for group, options in zip(optimizer.param_groups, self._options, strict=True):
            group.update(options | {"initial_lr": options["lr"], "lr": options["lr"] * factor})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the mean over all targets of the step.

        Lightning divides by the number of micro-batches and DDP by the number of ranks. Both are
        undone here, so that every target of the global batch has the same weight.
        """
        losses = self.sphinx.token_losses(batch)
        weights = batch.weights.flatten()[losses.index]
        total = batch.input_ids.new_tensor(batch.step_weight, dtype=torch.float32)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / total.clamp(min=1e-8)
        nll = losses.nll.detach()
        self._count(batch, nll, losses.index)
        if self._micro_batches and self._micro_batches[-1][0].ends_step:
            self._micro_batches.clear()
        self._micro_batches.append((dataclasses.replace(batch, pixels=batch.pixels[:0]), nll, losses.index))
        loss: Tensor = (losses.nll * weights).sum() * scale + losses.extra
        return loss

    def _count(self, batch: Batch, nll: Tensor, index: Tensor) -> None:
        names = [*(f"task/{name}" for name in batch.tasks), *(f"source/{name}" for name in batch.sources)]
        if self._sums is None or self._counted != names:  # a run may resume with other sources
            self._counted, self._sums = names, torch.zeros(2, len(names), dtype=torch.float64)
        sums = self._sums = self._sums.to(nll.device)
        finite = nll.isfinite()  # the others are counted as skipped steps
        values = torch.stack([nll.where(finite, 0), finite]).double()
        sums.index_add_(1, batch.task_ids.flatten()[index].long(), values)
        if batch.source_ids is not None:
            sums.index_add_(1, batch.source_ids.flatten()[index].long() + len(batch.tasks), values)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sums"] = {"counted": self._counted, "values": self._sums}
        checkpoint["parents"] = self.parents
        checkpoint["optim"] = asdict(self.optim)
        checkpoint["accumulate"] = self.trainer.accumulate_grad_batches
        checkpoint["nonfinite"] = [self.nonfinite_steps, self._nonfinite_in_a_row]
        names = sorted({*self._logged, *self.trainer.callback_metrics})
        checkpoint["logged"] = {name: self.last_value(name) for name in names}
        strategy = self.trainer.strategy
        if isinstance(strategy, Sharded):
            checkpoint["optimizer_names"] = strategy.optimizer_names
        else:
            checkpoint["optimizer_names"] = group_names(self.sphinx, strategy.optimizers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._counted, self._sums = checkpoint["sums"]["counted"], checkpoint["sums"]["values"]
        self.parents = checkpoint["parents"]
        # Lightning counts micro-batches, and a step may have had another number of them.
        before, now = checkpoint["accumulate"], self.trainer.accumulate_grad_batches
        for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
            if isinstance(counts, dict):
                counts.update({key: count // before * now for key, count in counts.items()})
        self.nonfinite_steps, self._nonfinite_in_a_row = checkpoint["nonfinite"]
        self._logged = checkpoint["logged"]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the global norm and log the step.

        Here its loss, gradients and learning rate are all known.

        Raises:
            NonFiniteError: the gradients were not finite in more than `max_nonfinite` consecutive
                steps.
        """
        if not self._micro_batches[-1][0].ends_step:  # DeepSpeed calls it after every micro-batch
            return
        norm, by_part = gradients.norms(self.sphinx.part_parameters())
        if math.isfinite(norm):
            self._nonfinite_in_a_row = 0
            factor = (gradient_clip_val or math.inf) / (norm + 1e-6)
            if factor < 1:
                gradients.scale(list(self.parameters()), factor)
        else:
            self._skip(norm)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            group = optimizer.param_groups[0]
            self._log_steps(norm, by_part, float(group["lr"] / group.get("lr_scale", 1.0)))

    def _skip(self, norm: float) -> None:
        """Make this step change nothing, and log the keys of its samples."""
        for parameter in self.parameters():
            parameter.grad = None  # ZeRO-3 sees the norm and skips the step itself
        self.nonfinite_steps += 1
        self._nonfinite_in_a_row += 1
        ranks = of_all_ranks(self._suspects(), self.trainer.world_size)
        bad, all_keys = [key for keys, _ in ranks for key in keys], [key for _, keys in ranks for key in keys]
        suspects = bad or all_keys
        what = "samples with such a loss" if bad else "all losses are finite; its samples"
        log.warning(
            "step %d is skipped because its gradient norm is %s; %s: %s%s",
            self.global_step + 1,
            norm,
            what,
            ", ".join(suspects[:20]),
            f" and {len(suspects) - 20} more" if len(suspects) > 20 else "",
        )
        if self._nonfinite_in_a_row > self.max_nonfinite:
            raise NonFiniteError(
                f"{self._nonfinite_in_a_row} steps in a row up to step {self.global_step + 1} had infinite gradients "
                "or gradients that are not a number (stage.max_nonfinite): lower stage.optim.lr, or remove the "
                "samples that the log names",
                first=self.global_step + 1 - self._nonfinite_in_a_row,
            )

    def _suspects(self) -> tuple[list[str], list[str]]:
        """The keys of this rank's samples of the step: those without a finite loss, and all."""
        bad = []
        for batch, nll, index in self._micro_batches:
            finite = (nll * batch.weights.flatten()[index]).isfinite()
            bad += batch.keys_at(index[~finite])
        return list(dict.fromkeys(bad)), [key for batch, _, _ in self._micro_batches for key in batch.keys]

    def _log_steps(self, norm: float, by_part: dict[str, float], lr: float) -> None:
        """Log a row for the steps since the last log, under the number of this step.

        The first step is 1.
        """
        assert self._sums is not None
        nll, count = self._reduced(self._sums).tolist()
        self._sums = None
        rows = list(zip(self._counted, nll, count, strict=True))
        # every target belongs to one task
        of_tasks = [row for row in rows if row[0].startswith("task/")]
        loss = sum(row[1] for row in of_tasks) / max(sum(row[2] for row in of_tasks), 1)
        metrics = {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr}
        metrics |= {f"train/grad_norm/{part}": value for part, value in by_part.items()}
        if self.nonfinite_steps:
            metrics["train/nonfinite_steps"] = float(self.nonfinite_steps)
        for name, total, n in rows:
            if n:
                metrics[f"train/loss_{name}"] = total / n
                metrics[f"train/targets_{name}"] = n
        self.log_now(metrics, self.global_step + 1)

    def log_now(self, metrics: dict[str, float], step: int) -> None:
        """Send numbers that are the same on all ranks to the loggers and to
        `trainer.callback_metrics`.

        Lightning's `log` takes up to a millisecond for each number. It also
        forwards them only after the step's checkpoint is written, so a run killed then would miss
        the row.

        Args:
            step: the number of optimizer steps made.
        """
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def last_value(self, name: str) -> float | None:
        """Return the value that was last logged under this name, including before a resume."""
        value = self.trainer.callback_metrics.get(name)
        return self._logged.get(name) if value is None else float(value)

    def _reduced(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    # -- held-out losses ---------------------------------------------------------------------------

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
                    f"data.val_sources.{name}: there is no target to measure ({unreadable[i]:.0f} images could not be "
                    "read): check the paths of its images"
                )
            metrics[f"val/loss/{name}"] = nll[i] / count[i]
        weights = self.val_weights or dict.fromkeys(self.val_names, 1.0)
        weighted = sum(weight * metrics[f"val/loss/{name}"] for name, weight in weights.items())
        metrics["val/loss"] = weighted / (sum(weights.values()) or 1)
        metrics |= {f"val/unreadable/{name}": n for name, n in zip(self.val_names, unreadable, strict=False) if n}
        if not self.trainer.sanity_checking:
            self.log_now(metrics, self.global_step)
        self.validated_at = self.global_step
