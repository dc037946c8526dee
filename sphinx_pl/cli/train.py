"""Train one stage: compose a configuration, build, fit, return the metric.

`python train.py --help` explains the configuration groups.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from sphinx_pl.runtime import run_folder, signals, slurm
from sphinx_pl.runtime.hydra_app import command_of, entry_point
from sphinx_pl.runtime.run_folder import RunFolder
from sphinx_pl.settings.train import TrainConfig, check_machine, check_train, stage_keys
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole

if TYPE_CHECKING:
    import lightning as L

    from sphinx_pl.stages import Stage

log = logging.getLogger(__name__)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)
"""What a disk answers that cannot hold what is written to it."""

_MEANS_THE_SAME = (
    "_target_",
    "stage.accumulate",
    "stage.checkpointing",
    "stage.init_from",
    "stage.max_nonfinite",
    "stage.val_every",
    "data.max_skipped",
    "data.packing.rows",
    "data.processor",
    "data.root",
    "data.test",
    "data.tokenizer",
    "data.val_",
    "data.workers",
)
"""Keys that another value of changes nothing in what a resumed run learns, or that are compared elsewhere."""


def enter(run: RunFolder) -> None:
    """Take the run folder, and put it in order after a run that was killed.

    Raises:
        UserError: another run works in it.
    """
    from sphinx_pl.callbacks import wandb_logger

    run.enter()
    run.came_back = slurm.came_back(run.path)
    run.settle(keep=[wandb_logger.FILE] if run.came_back else [])


def checkpoint_to_resume(cfg: DictConfig, folder: Path) -> Path | None:
    """The checkpoint that this run goes on from, or None for a new run. Only reads.

    Raises:
        UserError: there is none at `ckpt_path`, or two runs would mix in one folder.
    """
    from sphinx_pl.callbacks.checkpoint import checkpoints, resolve_resume, step_of

    own = folder / "checkpoints"
    if (folder / run_folder.AGAIN).exists():
        cfg.ckpt_path, cfg.overwrite = None, True
    elif slurm.came_back(folder) and checkpoints(own):  # else it begins as it did the first time
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
    return resume


def steps_passed(cfg: DictConfig, run: RunFolder, resume: Path | None) -> int:
    """The optimizer steps of this folder's run where they are all that are asked for, or more; else 0. Only reads."""
    reached = reached_by(run, resume)
    newer = any(path.parent.name == "checkpoints" for path in run.replaced_by(reached))
    return reached if 0 < cfg.trainer.max_steps <= reached and not newer else 0


def warn_of_changes(cfg: DictConfig, resume: Path) -> None:
    """One line that names what was configured otherwise in the run that wrote the checkpoint."""
    from sphinx_pl.checkpoints.format import differences, read_provenance
    from sphinx_pl.checkpoints.provenance import provenance

    before = read_provenance(resume).get("config")
    if not isinstance(before, dict):
        return
    now: Any = provenance("", OmegaConf.to_container(cfg, resolve=True))["config"]  # type: ignore[arg-type]
    found = [
        difference
        for key in ("stage", "data")
        for difference in differences(before.get(key) or {}, now.get(key) or {}, key)
        if not difference.removeprefix("stage.").startswith(_MEANS_THE_SAME)
        and not difference.startswith(_MEANS_THE_SAME)
    ]
    if found:
        more = f", and {len(found) - 8} more" if len(found) > 8 else ""
        log.warning("in the checkpoint and in this run: %s%s", ", ".join(found[:8]), more)


def reached_by(run: RunFolder, resume: Path | None) -> int:
    """Optimizer steps of this folder's run that a run which resumes there continues; -1 if it is a new run."""
    from sphinx_pl.callbacks.checkpoint import step_of

    own = run.path / "checkpoints"
    return step_of(resume) if resume is not None and resume.parent.resolve() == own.resolve() else -1


def check_inputs(cfg: DictConfig, run: RunFolder, resume: Path | None, tokenizer: Path) -> None:
    """Raises: UserError: what the run reads is what it would replace."""
    towers = [key for key, value in (cfg.model.vision or {}).items() if isinstance(value, DictConfig)]
    read = {f"model.vision.{key}.load": cfg.model.vision[key].get("load") for key in towers}
    read |= {"model.decoder.load": cfg.model.decoder.get("load"), "stage.init_from": cfg.stage.init_from}
    read = {"data.tokenizer": str(tokenizer)} | (read if resume is None else {})
    replaced = run.replaced_by(reached_by(run, resume))
    for key, path in read.items():
        if found := run_folder.inside(path, replaced):
            raise UserError(
                f"{key}={path} lies in {found}, which this run replaces: choose another folder for it with run=NAME"
            )


def check_disk(trainer: L.Trainer, stage: Stage, run: RunFolder) -> None:
    """Raises: UserError: the disk has no room for the checkpoints and models of this run."""
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
    there = [path for path in run.replaced_by(-1) if path.parent.name != "predictions"]
    check_disks(needs, there, "lower callbacks.checkpoint.keep or callbacks.export.keep, or choose another output_dir")


def prepare_run_folder(cfg: DictConfig, run: RunFolder, resume: Path | None) -> None:
    """Move aside what an earlier run left, and write down what runs. Called when everything else has been found right.

    Nothing is deleted: that is `RunFolder.saved`, when this run has saved something.
    """
    from hydra.core.hydra_config import HydraConfig

    from sphinx_pl.callbacks import wandb_logger
    from sphinx_pl.callbacks.csv_logger import forget_after
    from sphinx_pl.checkpoints.provenance import provenance

    folder, reached = run.path, reached_by(run, resume)
    for file in run_folder.run_logs():
        file.start()
    if steps_passed(cfg, run, resume):
        return  # nothing is left to train but the model is to be written
    same = cfg.ckpt_path == "last" or run.came_back  # else it is another run, so another one in W&B
    # The model too: else the next stage would start from the old weights if this run died.
    run.replace(reached, keep=[wandb_logger.FILE] if same else [])
    if reached >= 0:
        forget_after(folder / "metrics.csv", reached)
    folder.mkdir(parents=True, exist_ok=True)
    slurm.mark(folder)
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    environment = provenance(stage=cfg.stage.name, config=None, parents=[])
    environment |= {"platform": platform.platform(), "cpus": os.cpu_count()}
    write_whole(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    if HydraConfig.initialized():  # Hydra itself would write these before anything is checked
        hydra = HydraConfig.get()
        (folder / ".hydra").mkdir(exist_ok=True)
        parts = {"config": cfg, "hydra": OmegaConf.create({"hydra": hydra}), "overrides": hydra.overrides.task}
        for name, part in parts.items():
            write_whole(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(part))


def finish_export(trainer: L.Trainer) -> None:
    """The model of a run that was killed between its last checkpoint and its export: nothing is left to train then."""
    from sphinx_pl.callbacks.export import ExportModel

    for callback in trainer.callbacks:
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
        r"The `srun` command is available.*",  # sphinx_pl/runtime/ranks.py knows what started this process
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
        from sphinx_pl.planning.plan import print_plan

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
        # A requeued job goes on; whatever else ends before it has saved anything leaves the run that was there.
        if run.held and not getattr(error, "requeued", False) and run.settle():
            for file in run_folder.run_logs():
                file.undo()
            print(f"{run.path} is what it was before: this run had saved nothing", file=sys.stderr)
        raise
    finally:
        run.leave()
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
    from sphinx_pl.checkpoints.training import Pieces
    from sphinx_pl.data.datamodule import DataModule
    from sphinx_pl.data.held_out import held_out_weights
    from sphinx_pl.models.config import SphinxConfig
    from sphinx_pl.runtime import ranks
    from sphinx_pl.stages.stage import OTHERS_KEYS, NonFiniteError

    folder = run.path
    model = SphinxConfig.from_dict(cfg.model)
    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    datamodule = DataModule.from_config(values, model)

    L.seed_everything(cfg.seed, verbose=False)
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=[instantiate(c) for c in cfg.callbacks.values() if c],
        logger=[instantiate(entry) for entry in cfg.logger.values() if entry],
        plugins=[*instantiate(cfg.trainer.get("plugins") or []), ranks.cluster_environment()],
    )
    stoppable = any(isinstance(callback, Preemption) for callback in trainer.callbacks)
    if not stoppable:
        signals.unwatch()  # no one would act on it
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
    # Whatever can be found wrong is found before an older run is replaced.
    if resume is None:
        check_init_from(cfg)
    stage.check(datamodule.processor, trainer.strategy, resume)
    datamodule.check(cfg.stage.text_required, cfg.stage.accumulate, trainer.world_size)
    stage.val_weights = held_out_weights(values["sources"], datamodule.val_sources, datamodule.mixing.temperature)
    saved: dict[str, Any] = {} if resume is None else Pieces(resume).state()
    if resume is not None:
        datamodule.check_resume(saved.get("DataModule", {}), cfg.stage.accumulate, trainer.world_size)
    exports = [c for c in trainer.callbacks if isinstance(c, ExportModel)]
    for callback in exports:
        callback.check()

    def look() -> tuple[int, bool]:
        if not ranks.first_process():
            return 0, False  # started by the first, which trains or writes the model then
        return steps_passed(cfg, run, resume), all(callback.folder.exists() for callback in exports)

    passed, whole = ranks.on_first(trainer, look)
    if passed and whole:  # the file of messages isn't begun either: the folder stays as it is
        if ranks.first_process():
            log.info(say_passed(passed, cfg.trainer.max_steps, folder))
        return report_value(cfg, folder, saved.get("logged", {}).get(cfg.metric))
    if passed:
        trainer.loggers = []  # they would describe this command as the run that made the checkpoint
    threads = ranks.share_cores(trainer.num_devices)
    ranks.only_first(trainer, datamodule.probe)
    if ranks.first_process():
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in stage.val_weights.items())
        log.info("val/loss weighs the held-out sources by what this run trains on: %s", weights or "there are none")
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
            prepare_run_folder(cfg, run, resume)
        except OSError as error:  # whatever it is: the other processes wait for a word
            raise UserError(disk_failed(error, folder)) from error

    ranks.only_first(trainer, begin)
    if resume is not None:
        log.info("resuming from %s", resume)
    try:
        trainer.fit(stage, datamodule, ckpt_path=resume, weights_only=True)
        finish_export(trainer)
    except NonFiniteError as error:
        # Of weights that a step was made from; what was saved later may hold those that no step can be made from.
        good = [path for path in checkpoints(folder / "checkpoints") if step_of(path) < error.first]
        last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint is from before them"
        raise UserError(f"{error}; {last}") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a data worker ended before its work was done ({' '.join(str(error).split())}): it most likely ran out of "
            f"memory; {what_was_kept(folder)}. Lower data.workers or data.packing.rows first"
        ) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(disk_failed(error, folder)) from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes exit code 1 of it
            raise KeyboardInterrupt from None
        raise
    if run.held:
        run.saved()
        log.info(say_where(exports[0].folder if exports else None, folder))
    return report_value(cfg, folder, stage.last_value(cfg.metric))


def report_value(cfg: DictConfig, folder: Path, number: float | None) -> float | None:
    """Give the value of `metric` to a sweep, and say so where there is none under the name that was asked for."""
    from sphinx_pl.runtime import sweeps

    if number is None and cfg.metric != TrainConfig.metric:
        log.warning("metric=%s was not logged: %s has the names of what was", cfg.metric, shown(folder / "metrics.csv"))
    sweeps.leave_value(number)
    return number


def check_init_from(cfg: DictConfig) -> None:
    """Raises: UserError: the recipe's step that makes the weights to start from has not run; it says which."""
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


def shown(path: Path) -> Path:
    """As a person would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def what_was_kept(folder: Path) -> str:
    """The checkpoint that a run resumes from after it ended early."""
    from sphinx_pl.callbacks.checkpoint import checkpoints

    saved = checkpoints(folder / "checkpoints")
    return f"{shown(saved[-1])} is whole: ckpt_path=last resumes from it" if saved else "no checkpoint was saved before"


def disk_failed(error: OSError, folder: Path) -> str:
    """What could not be written, and what was kept."""
    what = f" '{shown(Path(os.fsdecode(error.filename)))}'" if error.filename else ""
    first = "Choose another output_dir" if error.errno in (errno.EROFS, errno.EACCES) else "Free some space first"
    return f"the run cannot write{what} ({error.strerror}), so it ends; {what_was_kept(folder)}. {first}"


def say_passed(steps: int, asked: int, folder: Path) -> str:
    """Why a resume trains nothing, and what trains more."""
    return (
        f"nothing was trained: the run in {shown(folder)} has already passed step {asked}, its newest checkpoint is of "
        f"step {steps}. Nothing in the folder has changed; stage.max_steps above {steps} trains on"
    )


def say_where(model: Path | None, folder: Path) -> str:
    """What a person does with what the run has made."""
    if model is None or not model.exists():
        return f"training has ended; {shown(folder)} holds no model, since callbacks.export writes none"
    path = shown(model)
    return (
        f"the model is in {path}: score it with `{command_of('evaluate')} checkpoint={path}`, "
        f"talk to it with `{command_of('chat')} checkpoint={path}`"
    )


_run = entry_point("train", check_train)(train)


def main() -> None:
    """The script. Signals are noted from the start, while libraries are still imported."""
    signals.watch()
    _run()


if __name__ == "__main__":
    main()
