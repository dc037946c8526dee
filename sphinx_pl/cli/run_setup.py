"""The run folder of train.py: the checkpoint to resume from, and the files of an earlier run."""

from __future__ import annotations

import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sphinx_pl.runtime import run_folder, slurm
from sphinx_pl.runtime.run_folder import RunFolder
from sphinx_pl.runtime.run_log import run_logs
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole
from sphinx_pl.utils.renamed import with_new_keys

log = logging.getLogger(__name__)

_UNIMPORTANT = (
    "_target_",
    "stage.accumulate",
    "stage.checkpointing",
    "stage.init_from",
    "stage.max_nonfinite",
    "stage.val_every",
    "data.max_skipped",
    "data.packing.micro_batch_rows",
    "data.processor",
    "data.root",
    "data.test",
    "data.tokenizer",
    "data.val_",
    "data.workers",
)
"""Keys that do not change what a resumed run learns, or that are compared elsewhere."""


def enter(run: RunFolder) -> None:
    """Acquire the run folder, and restore its order after a killed run.

    Raises:
        UserError: another run works in it.
    """
    from sphinx_pl.callbacks import wandb_logger

    run.lock.acquire()
    run.came_back = slurm.came_back(run.path)
    run.settle(keep=[wandb_logger.FILE] if run.came_back else [])


def checkpoint_to_resume(cfg: DictConfig, folder: Path) -> Path | None:
    """Return the checkpoint that this run resumes from, or None for a new run. Nothing is written.

    Raises:
        UserError: there is no checkpoint at `ckpt_path`, or two runs would mix in one folder.
    """
    from sphinx_pl.callbacks.checkpoint import checkpoints, resolve_resume, step_of

    own = folder / "checkpoints"
    if (folder / run_folder.AGAIN).exists():
        cfg.ckpt_path, cfg.overwrite = None, True
    elif slurm.came_back(folder) and checkpoints(own):  # otherwise it starts from scratch
        log.info("job %s was requeued: resuming the run in %s", slurm.job(), folder)
        cfg.ckpt_path, cfg.overwrite = "last", False
    resume = resolve_resume(cfg.ckpt_path, own)
    is_own = resume is not None and resume.parent.resolve() == own.resolve()
    results = [path for path in (*checkpoints(own), folder / "model") if path.exists()]
    if results and not is_own and not cfg.overwrite:
        raise UserError(
            f"{folder} already holds a run: ckpt_path=last resumes it, name=... or run=... starts another, "
            "overwrite=true overwrites it"
        )
    if resume is not None and is_own and not cfg.overwrite:
        newer = [path.name for path in checkpoints(own) if step_of(path) > step_of(resume)]
        if newer:
            raise UserError(
                f"ckpt_path={cfg.ckpt_path}: {own} holds newer ones ({', '.join(newer)}): ckpt_path=last resumes "
                "from the newest, overwrite=true deletes those after this one"
            )
    return resume


def steps_passed(cfg: DictConfig, run: RunFolder, resume: Path | None, data_ended: bool) -> int:
    """Return the optimizer steps of this folder's run if it has made all requested steps, else 0.

    Nothing is written.

    Args:
        data_ended: the checkpoint was made at the end of finite data, so no step follows.
    """
    reached = reached_by(run, resume)
    newer = any(path.parent.name == "checkpoints" for path in run.replaced_by(reached))
    passed = 0 < cfg.trainer.max_steps <= reached or (data_ended and reached > 0)
    return reached if passed and not newer else 0


def warn_of_changes(cfg: DictConfig, resume: Path) -> None:
    """Log the differences to the configuration of the run that wrote the checkpoint."""
    from sphinx_pl.checkpoints.folder import read_provenance
    from sphinx_pl.checkpoints.format import differences
    from sphinx_pl.checkpoints.provenance import provenance

    before = read_provenance(resume).get("config")
    if not isinstance(before, dict):
        return
    before = with_new_keys(before)
    now: Any = provenance("", OmegaConf.to_container(cfg, resolve=True))["config"]  # type: ignore[arg-type]
    changes = [
        difference
        for key in ("stage", "data")
        for difference in differences(before.get(key) or {}, now.get(key) or {}, key)
        if not difference.removeprefix("stage.").startswith(_UNIMPORTANT) and not difference.startswith(_UNIMPORTANT)
    ]
    # The trainer's other keys say where the same run works.
    old, new = ((config.get("trainer") or {}).get("precision") for config in (before, now))
    if old not in (None, new):
        changes.append(f"trainer.precision is {old!r} and {new!r}")
    if changes:
        more = f", and {len(changes) - 8} more" if len(changes) > 8 else ""
        log.warning("in the checkpoint and in this run: %s%s", ", ".join(changes[:8]), more)


def reached_by(run: RunFolder, resume: Path | None) -> int:
    """The optimizer steps of this folder's run that the new run continues; -1 for a new run."""
    from sphinx_pl.callbacks.checkpoint import step_of

    own = run.path / "checkpoints"
    return step_of(resume) if resume is not None and resume.parent.resolve() == own.resolve() else -1


def prepare_run_folder(cfg: DictConfig, run: RunFolder, resume: Path | None, passed: bool = False) -> None:
    """Move aside the files of an earlier run, and record this one.

    It is called after all other checks.

    Nothing is deleted until this run has saved something (`RunFolder.saved`).

    Args:
        passed: training is complete; only the export may be missing.
    """
    from hydra.core.hydra_config import HydraConfig

    from sphinx_pl.callbacks import wandb_logger
    from sphinx_pl.callbacks.csv_logger import forget_after
    from sphinx_pl.checkpoints.provenance import provenance

    folder, reached = run.path, reached_by(run, resume)
    for file in run_logs():
        file.start()
    if passed:
        return
    same = cfg.ckpt_path == "last" or run.came_back  # otherwise it is another run, also in W&B
    # The model is moved too. Otherwise the next stage would start from the old weights if this run
    # died.
    run.replace(reached, keep=[wandb_logger.FILE] if same else [])
    if reached >= 0:
        forget_after(folder / "metrics.csv", reached)
    folder.mkdir(parents=True, exist_ok=True)
    slurm.mark(folder)
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    environment = provenance(stage=cfg.stage.name, config=None, parents=[])
    environment |= {"platform": platform.platform(), "cpus": os.cpu_count()}
    write_whole(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    if HydraConfig.initialized():  # Hydra itself would write them before all checks
        hydra = HydraConfig.get()
        (folder / ".hydra").mkdir(exist_ok=True)
        parts = {"config": cfg, "hydra": OmegaConf.create({"hydra": hydra}), "overrides": hydra.overrides.task}
        for name, part in parts.items():
            write_whole(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(part))
