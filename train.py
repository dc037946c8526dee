"""Train one stage: compose a configuration, build, fit, return the metric.

`python train.py --help` explains the configuration groups.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import platform
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from sphinx_pl import slurm, stop
from sphinx_pl.cli import entry_point
from sphinx_pl.errors import UserError, suggest
from sphinx_pl.files import write_whole

if TYPE_CHECKING:
    import lightning as L

    from sphinx_pl.models.config import SphinxConfig

log = logging.getLogger(__name__)


def checkpoint_to_resume(cfg: DictConfig, folder: Path, model: SphinxConfig) -> Path | None:
    """The checkpoint that this run goes on from, or None for a new run.

    Raises:
        UserError: two runs would mix in one folder, or the checkpoint is damaged or of another model.
    """
    from callbacks.checkpoint import checkpoints, resolve_resume, step_of

    own = folder / "checkpoints"
    if slurm.came_back(folder) and checkpoints(own):  # else it begins as it did the first time
        log.info("job %s was requeued: going on with the run in %s", slurm.job(), folder)
        cfg.ckpt_path, cfg.overwrite = "last", False
    resume = resolve_resume(cfg.ckpt_path, own)
    ours = resume is not None and resume.parent.resolve() == own.resolve()
    used = [path for path in (*checkpoints(own), folder / "model") if path.exists()]
    if used and not ours and not cfg.overwrite:
        raise UserError(
            f"{folder} already holds a run: ckpt_path=last continues it, name=... or run=... starts another, "
            "overwrite=true replaces it"
        )
    if resume is not None and ours and not cfg.overwrite:
        newer = [path.name for path in checkpoints(own) if step_of(path) > step_of(resume)]
        if newer:
            raise UserError(
                f"ckpt_path={cfg.ckpt_path}: {own} holds newer ones ({', '.join(newer)}): ckpt_path=last goes on "
                "from the newest, overwrite=true drops what came after this one"
            )
    if resume is not None:
        check_resume(resume, model)
    return resume


def check_resume(resume: Path, model: SphinxConfig) -> None:
    """Raises: UserError: the file is damaged, foreign, or of another model."""
    import torch

    from sphinx_pl.checkpoint.format import compare
    from sphinx_pl.checkpoint.training import Pieces
    from sphinx_pl.models.sphinx import Sphinx

    try:
        found = Pieces(resume).shapes
    except UserError as error:
        raise UserError(f"ckpt_path={resume} is not a checkpoint to resume from: {error}") from None
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in Sphinx(model).named_parameters()}
    if problem := compare(wanted, found):
        raise UserError(f"ckpt_path={resume} is of another model: {problem}")


def prepare_run_folder(cfg: DictConfig, folder: Path, resume: Path | None) -> None:
    """Clear what a replaced run left, and write down what runs. Called when everything else has been found right."""
    from callbacks import wandb_logger
    from callbacks.checkpoint import checkpoints, step_of
    from callbacks.csv_logger import forget_after
    from sphinx_pl.checkpoint.format import discard
    from sphinx_pl.checkpoint.provenance import provenance

    own = folder / "checkpoints"
    reached = step_of(resume) if resume is not None and resume.parent.resolve() == own.resolve() else 0
    models = {path: int(n) for path in folder.glob("model-step-*") if (n := path.name.rpartition("-")[2]).isdigit()}
    for path in reversed(checkpoints(own)):  # the newest first: a kill in between leaves no gap
        if step_of(path) > reached:
            discard(path)
    for path, step in models.items():
        if step > reached:
            discard(path)
    finished = bool(0 < cfg.trainer.max_steps <= reached)  # but for the export
    if reached and not finished:
        forget_after(folder / "metrics.csv", reached)
    if not reached:
        (folder / "metrics.csv").unlink(missing_ok=True)
        for left in (folder / "predictions", folder / "tensorboard"):
            shutil.rmtree(left, ignore_errors=True)
    # Else the next stage would start from the old weights if this run died.
    if not finished:
        discard(folder / "model")
    if not (reached or cfg.ckpt_path == "last" or slurm.came_back(folder)):
        (folder / wandb_logger.FILE).unlink(missing_ok=True)  # another run, so another one in W&B
    folder.mkdir(parents=True, exist_ok=True)
    slurm.mark(folder)
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    environment = provenance(stage=cfg.stage.name, config=None, parents=[])
    environment |= {"platform": platform.platform(), "cpus": os.cpu_count()}
    write_whole(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def finish_export(trainer: L.Trainer) -> None:
    """The model of a run that was killed between its last checkpoint and its export: nothing is left to train then."""
    from callbacks.export import ExportModel

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ExportModel) and trainer.strategy.broadcast(not callback.folder.exists()):
            callback.on_train_end(trainer, trainer.lightning_module)


def quiet_known_warnings() -> None:
    """What Lightning warns of and this project does on purpose, or what only Lightning can mend."""
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r"Found \d+ module\(s\) in eval mode.*",  # frozen towers
        r".*does not have many workers.*",  # workers only decode; one is usually enough
        r"It is recommended to use .*sync_dist=True.*",  # they are summed over ranks before
        r"Since DeepSpeed handles gradient clipping internally.*",
        r"The `srun` command is available.*",  # sphinx_pl/processes.py knows what started this process
        r"The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def train(cfg: DictConfig) -> float | None:
    """Run one stage.

    Returns:
        The logged value named by `metric`, or None if it was not logged.
    """
    from hydra.core.hydra_config import HydraConfig

    if cfg.plan:
        from sphinx_pl.plan import print_plan

        print_plan(cfg, str(HydraConfig.get().runtime.choices.get("trainer", "")))
        return None
    import lightning as L
    from hydra.utils import get_class, instantiate

    from callbacks.checkpoint import checkpoints, step_of
    from callbacks.preemption import Preemption
    from sphinx_pl import processes, sweep
    from sphinx_pl.data.datamodule import DataModule
    from sphinx_pl.models.config import SphinxConfig
    from sphinx_pl.stages.stage import OTHERS_KEYS, NonFiniteError

    quiet_known_warnings()
    hydra = HydraConfig.get()
    cfg.point = cfg.point or sweep.point_name(hydra)
    if sweep.needs_a_process(cfg, hydra):
        return sweep.run_point(cfg, hydra)
    folder = Path(hydra.runtime.output_dir)
    processes.adopt_processes(cfg.trainer, hydra.overrides.task)
    model = SphinxConfig.from_dict(cfg.model)
    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    datamodule = DataModule.from_config(values, model)

    L.seed_everything(cfg.seed, verbose=False)
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=[instantiate(c) for c in cfg.callbacks.values() if c],
        logger=[instantiate(entry) for entry in cfg.logger.values() if entry],
        plugins=[*instantiate(cfg.trainer.get("plugins") or []), processes.cluster_environment()],
    )
    if not any(isinstance(callback, Preemption) for callback in trainer.callbacks):
        stop.unwatch()  # no one would act on it
    processes.join(trainer)
    resume = processes.on_first(trainer, lambda: checkpoint_to_resume(cfg, folder, model))
    options: dict[str, Any] = OmegaConf.to_container(cfg.stage, resolve=True)  # type: ignore[assignment]
    kind = get_class(options.pop("_target_"))
    for key in OTHERS_KEYS:
        options.pop(key)
    known = inspect.signature(kind).parameters
    for key in options:
        if key not in known:
            raise UserError(f"stage.{key} is not a key of {kind.__name__}: {suggest(key, known)}")
    stage = kind(model, val_names=datamodule.val_names, **options)
    stage.resumed = resume is not None
    # Whatever can be found wrong is found before an older run is replaced.
    stage.check(datamodule.processor)
    datamodule.check(cfg.stage.text_required, cfg.stage.accumulate, trainer.world_size)
    processes.only_first(trainer, datamodule.probe)
    if processes.first_process():
        log.info("%s%s in %s", cfg.run, f", point {cfg.point}" if cfg.point else "", folder)
    processes.only_first(trainer, lambda: prepare_run_folder(cfg, folder, resume))
    if resume is not None:
        log.info("resuming from %s", resume)
    try:
        trainer.fit(stage, datamodule, ckpt_path=resume, weights_only=True)
    except NonFiniteError as error:
        # Of weights that a step was made from; what was saved later may hold those that no step can be made from.
        good = [path for path in checkpoints(folder / "checkpoints") if step_of(path) < error.first]
        last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint is from before them"
        raise UserError(f"{error}; {last}") from None
    finish_export(trainer)
    number = stage.last_value(cfg.metric)
    sweep.leave_value(number)
    return number


main = entry_point("train")(train)

if __name__ == "__main__":
    stop.watch()
    main()
