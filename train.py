"""Train one stage: compose a configuration, build, fit, return the metric.

`python train.py --help` explains the configuration groups.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sphinx_pl.cli import entry_point
from sphinx_pl.errors import UserError

log = logging.getLogger(__name__)


def prepare_run_folder(cfg: DictConfig, folder: Path) -> Path | None:
    """Refuse to mix two runs in one folder; record what runs. Returns the checkpoint to resume from, if any."""
    from callbacks.checkpoint import checkpoints, resolve_resume, step_of
    from callbacks.csv_logger import forget_after
    from sphinx_pl.checkpoint.provenance import provenance

    resume = resolve_resume(cfg.ckpt_path, folder / "checkpoints")
    if resume is None and checkpoints(folder / "checkpoints"):
        if not cfg.overwrite:
            raise UserError(
                f"{folder} already holds a run: ckpt_path=last continues it, name=... or run=... starts another, "
                "overwrite=true replaces it"
            )
        for old in [*checkpoints(folder / "checkpoints"), folder / "metrics.csv"]:
            old.unlink(missing_ok=True)
    if resume is not None and resume.parent == folder / "checkpoints":
        forget_after(folder / "metrics.csv", step_of(resume))
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    environment = provenance(stage=cfg.stage.name, config=None, parents=[])
    environment |= {"platform": platform.platform(), "cpus": os.cpu_count()}
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    return resume


def quiet_known_warnings() -> None:
    """What Lightning warns of and this project does on purpose, or what only Lightning can mend."""
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r"Found \d+ module\(s\) in eval mode.*",  # frozen towers
        r".*does not have many workers.*",  # workers only decode; one is usually enough
        r"The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def train(cfg: DictConfig) -> float | None:
    """Run one stage.

    Returns:
        The logged value named by `metric`, or None if it was not logged.
    """
    import hydra
    import lightning as L
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from sphinx_pl.data.datamodule import DataModule
    from sphinx_pl.data.processor import Processor
    from sphinx_pl.models.config import SphinxConfig

    quiet_known_warnings()
    folder = Path(HydraConfig.get().runtime.output_dir)
    model = SphinxConfig.from_dict(cfg.model)
    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    processor = Processor.from_dict(values["processor"], values["tokenizer"], model)
    keys = ("packing", "workers", "seed", "val_samples", "max_skipped", "sources", "val_sources")
    datamodule = DataModule(processor, **{key: values[key] for key in keys})
    resume = prepare_run_folder(cfg, folder)

    L.seed_everything(cfg.seed, verbose=False)
    options: dict[str, Any] = OmegaConf.to_container(cfg.stage, resolve=True)  # type: ignore[assignment]
    kind = hydra.utils.get_class(options.pop("_target_"))
    for key in ("max_steps", "accumulate", "clip", "val_every"):  # the trainer's
        options.pop(key)
    stage = kind(model, val_names=datamodule.val_names, **options)
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=[instantiate(c) for c in cfg.callbacks.values() if c],
        logger=[instantiate(entry) for entry in cfg.logger.values() if entry],
    )
    if resume is None:
        trainer.validate(stage, datamodule, verbose=False)  # the held-out losses before the stage
    else:
        log.info("resuming from %s", resume)
    trainer.fit(stage, datamodule, ckpt_path=resume, weights_only=True)
    value = trainer.callback_metrics.get(cfg.metric)
    return None if value is None else float(value)


main = entry_point("train")(train)

if __name__ == "__main__":
    main()
