"""Train one stage: compose a configuration, build, fit, return the metric.

`python train.py --help` explains the configuration groups.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from sphinx_pl.cli.run_setup import (
    checkpoint_to_resume,
    enter,
    prepare_run_folder,
    reached_by,
    steps_passed,
    warn_of_changes,
)
from sphinx_pl.runtime import run_folder, signals
from sphinx_pl.runtime.hydra_app import command_of, entry_point
from sphinx_pl.runtime.run_folder import RunFolder
from sphinx_pl.runtime.run_log import run_logs
from sphinx_pl.settings.train import TrainConfig, check_machine, check_train, stage_keys
from sphinx_pl.utils.errors import UserError

if TYPE_CHECKING:
    import lightning as L

    from sphinx_pl.stages import Stage

log = logging.getLogger(__name__)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)
"""Errors of a disk that cannot hold the data written to it."""


def check_inputs(cfg: DictConfig, run: RunFolder, resume: Path | None, tokenizer: Path) -> None:
    """Check that the run does not read files that it would replace.

    Raises:
        UserError: it does.
    """
    from sphinx_pl.models.config import SphinxConfig

    vision = SphinxConfig.from_dict(cfg.model).vision
    read = {f"{encoder.section}.load": encoder.load for encoder in (vision.encoders.values() if vision else ())}
    read |= {"model.decoder.load": cfg.model.decoder.get("load"), "stage.init_from": cfg.stage.init_from}
    read = {"data.tokenizer": str(tokenizer)} | (read if resume is None else {})
    replaced = run.replaced_by(reached_by(run, resume))
    for key, path in read.items():
        if folder := run_folder.inside(path, replaced):
            raise UserError(
                f"{key}={path} lies in {folder}, which this run replaces: choose another folder for it with run=NAME"
            )


def check_disk(trainer: L.Trainer, stage: Stage, run: RunFolder) -> None:
    """Check that the disk has room for the checkpoints and models of this run.

    Raises:
        UserError: it has not.
    """
    from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint, training_bytes
    from sphinx_pl.callbacks.export import ExportModel
    from sphinx_pl.utils.files import check_disks

    size, needs = training_bytes(stage, trainer.strategy), []
    for callback in trainer.callbacks:
        if isinstance(callback, ResumeCheckpoint):
            needs.append((callback.folder, callback.most(trainer.max_steps) * size, size))
        elif isinstance(callback, ExportModel):
            model = callback.model_bytes(stage)
            needs.append((callback.folder, callback.most(trainer.max_steps) * model, 0))
    replaced = [path for path in run.replaced_by(-1) if path.parent.name != "predictions"]
    check_disks(
        needs, replaced, "lower callbacks.checkpoint.keep or callbacks.export.keep, or choose another output_dir"
    )


def finish_export(trainer: L.Trainer) -> None:
    """Write the model of a run that was killed between its last checkpoint and its export."""
    from sphinx_pl.callbacks.export import ExportModel

    for callback in trainer.callbacks:
        if isinstance(callback, ExportModel) and trainer.strategy.broadcast(not callback.folder.exists()):
            callback.on_train_end(trainer, trainer.lightning_module)


def quiet_known_warnings() -> None:
    """Silence Lightning's warnings of things that are intended, or that only Lightning can fix."""
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r"Found \d+ module\(s\) in eval mode.*",  # frozen encoders
        r".*does not have many workers.*",  # workers only decode; one is usually enough
        r"It is recommended to use .*sync_dist=True.*",  # Values are summed over ranks before.
        r"Since DeepSpeed handles gradient clipping internally.*",
        # sphinx_pl/runtime/ranks.py knows what started this process.
        r"The `srun` command is available.*",
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
        from sphinx_pl.planning.printing import print_plan

        print_plan(cfg, str(HydraConfig.get().runtime.choices.get("trainer", "")))
        return None
    from sphinx_pl.runtime import ranks, sweeps

    quiet_known_warnings()
    hydra = HydraConfig.get()
    cfg.point = cfg.point or sweeps.point_name(hydra)
    if sweeps.needs_a_process(cfg, hydra):
        return sweeps.run_point(cfg, hydra)
    ranks.adopt_processes(cfg.trainer, hydra.overrides.task)
    check_machine(cfg.trainer)
    run = RunFolder(Path(hydra.runtime.output_dir))
    handler = signal.getsignal(signals.INTERRUPT)
    try:
        return run_stage(cfg, run)
    except BaseException as error:
        # A requeued job resumes. Any other end before the run has saved restores the earlier run.
        if run.lock.held and not getattr(error, "requeued", False) and run.settle():
            for file in run_logs():
                file.undo()
            print(f"{run.path} is restored, since this run had saved nothing", file=sys.stderr)
        raise
    finally:
        run.lock.release()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signals.INTERRUPT, handler)


def run_stage(cfg: DictConfig, run: RunFolder) -> float | None:
    """Check everything, then build and train. See `train`."""
    import lightning as L
    from hydra.utils import get_class, instantiate
    from lightning.pytorch.accelerators import CPUAccelerator

    from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint, checkpoints, step_of
    from sphinx_pl.callbacks.export import ExportModel
    from sphinx_pl.callbacks.preemption import Preemption
    from sphinx_pl.callbacks.wandb_logger import RunLogger
    from sphinx_pl.checkpoints.training import TrainingShards
    from sphinx_pl.data.datamodule import DataModule
    from sphinx_pl.data.held_out import held_out_weights
    from sphinx_pl.models.config import SphinxConfig
    from sphinx_pl.runtime import ranks
    from sphinx_pl.stages.checks import with_new_tokens
    from sphinx_pl.stages.stage import OTHERS_KEYS, NonFiniteError

    folder = run.path
    model = SphinxConfig.from_dict(cfg.model)
    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    datamodule = DataModule.from_config(values, model)
    model, new_tokens = with_new_tokens(model, datamodule.processor.tokenizer)

    L.seed_everything(cfg.seed, verbose=False)
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=[instantiate(c) for c in cfg.callbacks.values() if c],
        logger=[instantiate(entry) for entry in cfg.logger.values() if entry],
        plugins=[*instantiate(cfg.trainer.get("plugins") or []), ranks.cluster_environment()],
    )
    stoppable = any(isinstance(callback, Preemption) for callback in trainer.callbacks)
    if not stoppable:
        signals.unwatch()  # no callback would act on a signal
    ranks.join(trainer)

    def resume_from() -> Path | None:
        if ranks.first_process():
            enter(run)
        return checkpoint_to_resume(cfg, folder)

    resume = ranks.on_first(trainer, resume_from)
    options: dict[str, Any] = OmegaConf.to_container(cfg.stage, resolve=True)  # type: ignore[assignment]
    own = stage_keys(options["_target_"]) - {*OTHERS_KEYS, "_target_"}
    kind = get_class(options["_target_"])
    stage = kind(model, val_names=datamodule.val_names, **{key: options[key] for key in options if key in own})
    stage.resumed = resume is not None
    # All mistakes are reported before an older run is replaced.
    if resume is None:
        check_init_from(cfg)
    stage.check(datamodule.processor, trainer.strategy, resume)
    datamodule.check(cfg.stage.text_required, cfg.stage.accumulate, trainer.world_size)
    stage.val_weights = held_out_weights(values["sources"], datamodule.val_sources, datamodule.mixing.temperature)
    saved: dict[str, Any] = {} if resume is None else TrainingShards(resume).state()
    ended = False
    if resume is not None:
        datamodule.check_resume(saved.get("DataModule", {}), cfg.stage.accumulate, trainer.world_size)
        ended = datamodule.ends_at(saved.get("DataModule", {}))
    exports = [c for c in trainer.callbacks if isinstance(c, ExportModel)]
    for callback in exports:
        callback.check()

    def look() -> tuple[int, bool]:
        if not ranks.first_process():
            return 0, False  # the first process starts this one only to train or write
        return steps_passed(cfg, run, resume, ended), all(callback.folder.exists() for callback in exports)

    passed, exported = ranks.on_first(trainer, look)
    if passed and exported:  # not even the log is opened, so the folder stays unchanged
        if ranks.first_process():
            log.info(say_passed(passed, None if ended else cfg.trainer.max_steps, folder))
        return report_value(cfg, folder, saved.get("logged", {}).get(cfg.metric))
    if passed:
        # loggers would describe this command as the run that made the checkpoint
        trainer.loggers = []
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            ranks.only_first(trainer, logger.check)
    threads = ranks.share_cores(trainer.num_devices)
    ranks.only_first(trainer, datamodule.probe)
    if ranks.first_process():
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in stage.val_weights.items())
        log.info("val/loss weighs the held-out sources by what this run trains on: %s", weights or "there are none")
        if new_tokens:
            log.info(new_tokens)
        if isinstance(trainer.accelerator, CPUAccelerator):
            log.info(threads)
        log.info("%s%s in %s", cfg.run, f", point {cfg.point}" if cfg.point else "", folder)
        if resume is not None:
            warn_of_changes(cfg, resume)

    def begin() -> None:
        check_inputs(cfg, run, resume, datamodule.processor.tokenizer.path)
        check_disk(trainer, stage, run)
        for callback in trainer.callbacks:
            if isinstance(callback, ResumeCheckpoint | ExportModel):
                callback.written = run.saved
        signals.watch(interrupt=True) if stoppable else None
        try:
            prepare_run_folder(cfg, run, resume, passed > 0)
        except OSError as error:  # the other processes wait for an answer
            raise UserError(disk_failed(error, folder)) from error

    ranks.only_first(trainer, begin)
    if resume is not None:
        log.info("resuming from %s", resume)
    try:
        trainer.fit(stage, datamodule, ckpt_path=resume, weights_only=True)
        finish_export(trainer)
    except NonFiniteError as error:
        # The good checkpoints were saved before the first bad step. Later weights may be the cause.
        good = [path for path in checkpoints(folder / "checkpoints") if step_of(path) < error.first]
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no earlier checkpoint"
        raise UserError(f"{error}; {last}") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a data worker ended before its work was done ({' '.join(str(error).split())}): it most likely ran out of "
            f"memory; {kept_checkpoint(folder)}. Lower data.workers or data.packing.micro_batch_rows first"
        ) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(disk_failed(error, folder)) from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into exit code 1
            raise KeyboardInterrupt from None
        raise
    if run.lock.held:
        run.saved()
        log.info(say_where(exports[0].folder if exports else None, folder))
    return report_value(cfg, folder, stage.last_value(cfg.metric))


def report_value(cfg: DictConfig, folder: Path, number: float | None) -> float | None:
    """Give the value of `metric` to a sweep, and warn if no value has that name."""
    from sphinx_pl.runtime import sweeps

    if number is None and cfg.metric != TrainConfig.metric:
        log.warning(
            "metric=%s was not logged: %s has the names of the logged values",
            cfg.metric,
            as_typed(folder / "metrics.csv"),
        )
    sweeps.leave_value(number)
    return number


def check_init_from(cfg: DictConfig) -> None:
    """Check that the recipe's step that makes the initial weights has run.

    Raises:
        UserError: it has not. The message names the step.
    """
    start, output = Path(str(cfg.stage.init_from or "")), Path(str(cfg.output_dir))
    if not cfg.stage.init_from or start.exists() or not start.is_relative_to(output):
        return
    step, *rest = start.relative_to(output).parts
    if rest == ["model"]:
        command = f"{command_of('train')} stage={step}"
    elif not rest and step == "mixed":
        models = f"{output}/pretrain_real/model,{output}/pretrain_synthetic/model"
        command = f"{command_of('mix_weights')} checkpoints=[{models}] beta=0.5 out={start}"
    else:
        return
    earlier = start.with_name(run_folder.BEFORE)
    instead = f"; the model of an earlier run is in {earlier}" if earlier.exists() else ""
    raise UserError(
        f"stage.init_from={start} does not exist: '{command}' makes it, `sphinx-pipeline` runs all "
        f"steps, and stage.init_from=null starts from new weights{instead}"
    )


def as_typed(path: Path) -> Path:
    """Return the path as a user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def kept_checkpoint(folder: Path) -> str:
    """Return a sentence that names the checkpoint from which an interrupted run resumes."""
    from sphinx_pl.callbacks.checkpoint import checkpoints

    saved = checkpoints(folder / "checkpoints")
    if not saved:
        return "no checkpoint was saved"
    return f"{as_typed(saved[-1])} is complete: ckpt_path=last resumes from it"


def disk_failed(error: OSError, folder: Path) -> str:
    """Return a sentence that names the file that could not be written, and the kept checkpoint."""
    what = f" '{as_typed(Path(os.fsdecode(error.filename)))}'" if error.filename else ""
    first = "Choose another output_dir" if error.errno in (errno.EROFS, errno.EACCES) else "Free some space first"
    return f"the run cannot write{what} ({error.strerror}), so it ends; {kept_checkpoint(folder)}. {first}"


def say_passed(steps: int, max_steps: int | None, folder: Path) -> str:
    """Return a sentence that tells why a resume trains nothing, and how to train further.

    Args:
        max_steps: the requested steps; None if the run ended with its data.
    """
    what = f"passed step {max_steps}" if max_steps is not None else "read its sources as often as their epochs say"
    more = f"set stage.max_steps above {steps}" if max_steps is not None else "raise data.mixing.epochs"
    return (
        f"nothing was trained: the run in {as_typed(folder)} has already {what}, and its newest "
        f"checkpoint is from step {steps}. Nothing in the folder has changed; {more} to train further"
    )


def say_where(model: Path | None, folder: Path) -> str:
    """Return a sentence that tells the user how to use the result of the run."""
    if model is None or not model.exists():
        return f"training has ended; {as_typed(folder)} holds no model, since callbacks.export writes none"
    path = as_typed(model)
    return (
        f"the model is in {path}: evaluate it with `{command_of('evaluate')} checkpoint={path}`, "
        f"talk to it with `{command_of('chat')} checkpoint={path}`"
    )


_run = entry_point("train", check_train)(train)


def main() -> None:
    """The script. Signals are noted from the start, while libraries are still imported."""
    signals.watch()
    _run()


if __name__ == "__main__":
    main()
