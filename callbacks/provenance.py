"""Tells every logger which run it records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import OmegaConf

from sphinx_pl.checkpoints.provenance import provenance
from sphinx_pl.stages import Stage
from sphinx_pl.utils.errors import UserError


def run_info(stage: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a logger keeps beside the curves: the stage, the composed configuration (without
    secrets), the code.
    """
    origin = provenance(stage=stage, config=config)
    code = origin["code"]
    return {
        "stage": stage,
        "config": origin["config"],
        # It is empty for an installed package, whose version identifies the code.
        "git_commit": code.get("commit", ""),
        "git_dirty": code.get("dirty", False),
        "code_version": code["version"],
        "versions": origin["versions"],
        "command": " ".join(origin["command"]),
        "parents": origin["parents"],
    }


class RunInfo(L.Callback):
    """Logs `run_info` as hyperparameters when training starts.

    Args:
        config: the file with the composed configuration that train.py keeps in the run folder.

    Raises:
        UserError: there is no such file.
    """

    def __init__(self, config: str) -> None:
        self.config = Path(config)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Stage)
        if not self.config.is_file():
            raise UserError(
                f"callbacks.provenance.config: there is no file {self.config}; train.py writes it when it starts"
            )
        config = OmegaConf.to_container(OmegaConf.load(self.config), resolve=True)
        assert isinstance(config, dict)
        info = run_info(pl_module.name, {str(key): value for key, value in config.items()})
        for logger in trainer.loggers:
            logger.log_hyperparams(info)
