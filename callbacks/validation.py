"""Held-out losses before the first step and after the last one."""

from __future__ import annotations

from typing import Any

import lightning as L

from sphinx_pl.stages import Stage


class ValidateAtEnds(L.Callback):
    """Validates when a new run starts, and when training ends between two regular validations.

    It runs inside `trainer.fit`, since a model sharded for training cannot be set up again for
    `trainer.validate`. Put it before the callbacks that write checkpoints.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._validate(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Stage)
        if pl_module.validated_at != trainer.global_step:
            self._validate(trainer)

    @staticmethod
    def _validate(trainer: Any) -> None:
        """Validate as Lightning does between two training steps."""
        if not trainer.enable_validation:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
