"""The keys of train.py: its own, the stage's and the trainer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf, open_dict

from sphinx_pl.runtime.ranks import count_devices
from sphinx_pl.settings.data import check_benchmark, check_data
from sphinx_pl.settings.instances import check_instance, parameters
from sphinx_pl.utils.config import build, pick, refuse_unread, within
from sphinx_pl.utils.errors import UserError

SEEDS = 2**32 - 1
"""The largest seed that NumPy accepts."""


@dataclass
class TrainConfig:
    """The keys of conf/train.yaml outside of groups, with their types. That file explains them."""

    name: str = "run"
    run: str = ""
    output_dir: str = ""
    seed: int = within(0, at_least=0, at_most=SEEDS)
    ckpt_path: Optional[str] = None
    overwrite: bool = False
    point: Optional[str] = None
    metric: str = "val/loss"
    plan: bool = False


@dataclass
class StageConfig:
    """The keys of conf/stage/*.yaml with their types and bounds.

    A stage class of your own may add keys.
    """

    name: str
    train_parts: list[str]
    optim: dict[str, Any]
    max_steps: int = within(at_least=1)
    text_required: bool = True
    init_from: Optional[str] = None
    global_batch_rows: Optional[int] = within(None, at_least=1)
    accumulate: int = within(1, at_least=1)
    clip: Optional[float] = within(None, at_least=0)
    checkpointing: str = "none"
    max_nonfinite: int = within(10, at_least=0)
    val_every: int = within(0, at_least=0)


@dataclass
class TrainerConfig:
    """Numbers of the trainer that Lightning itself does not check before training."""

    max_steps: int = within(1, at_least=1)
    num_nodes: int = within(1, at_least=1)
    log_every_n_steps: int = within(50, at_least=1)


TRAINER_WORKS = frozenset(
    {
        *("accelerator", "strategy", "devices", "num_nodes", "precision", "max_steps", "max_time"),
        *("limit_val_batches", "val_check_interval", "log_every_n_steps", "enable_model_summary"),
        *("deterministic", "benchmark", "inference_mode", "profiler", "detect_anomaly", "plugins"),
    }
)
"""Arguments of Lightning's Trainer that have their usual effect here."""

TRAINER_OURS: dict[str, tuple[Any, str]] = {
    "logger": (None, "choose loggers with logger="),
    "callbacks": (None, "choose callbacks with callbacks="),
    "fast_dev_run": (False, "use debug=one_batch"),
    "max_epochs": (-1, "set stage.max_steps, or data.mixing.epochs to end when the data has been read"),
    "min_epochs": (None, "set stage.max_steps, or data.mixing.epochs to end when the data has been read"),
    "min_steps": (None, "set stage.max_steps"),
    "limit_train_batches": (None, "set stage.max_steps, or use debug=overfit to repeat one step"),
    "reload_dataloaders_every_n_epochs": (0, "use debug=overfit to repeat one step"),
    "limit_test_batches": (None, "there is no test loop; evaluate.py has limit="),
    "limit_predict_batches": (None, "there is no prediction loop; evaluate.py has limit="),
    "overfit_batches": (0, "use debug=overfit to repeat one step"),
    "check_val_every_n_epoch": (None, "set stage.val_every"),
    "num_sanity_val_steps": (0, "callbacks.validation measures held-out losses before the first step"),
    "enable_checkpointing": (False, "set callbacks.checkpoint.every_n_steps"),
    "enable_progress_bar": (False, "callbacks.progress shows progress"),
    "accumulate_grad_batches": ("${stage.accumulate}", "set stage.accumulate or stage.global_batch_rows"),
    "gradient_clip_val": ("${stage.clip}", "set stage.clip"),
    "gradient_clip_algorithm": (None, "gradients are clipped by their global norm; stage.clip sets it"),
    "use_distributed_sampler": (False, "the data module gives each rank its own part"),
    "barebones": (False, "choose fewer loggers and callbacks with logger= and callbacks="),
    "sync_batchnorm": (False, "the model has no batch normalization"),
    "default_root_dir": ("${hydra:runtime.output_dir}", "set output_dir, name or run"),
    "enable_autolog_hparams": (True, "callbacks.provenance logs the configuration"),
    "model_registry": (None, "callbacks.export writes the model"),
}
"""Arguments that other sections replace: their only allowed value, and what to use."""


def check_trainer(cfg: DictConfig) -> None:
    """Check that all of the trainer's arguments have an effect.

    Raises:
        UserError: an argument has none. The message tells what to use instead.
    """
    trainer, arguments = cfg.trainer, _written(cfg, "trainer")
    # With debug=overfit a new loader for every epoch of one step repeats the same step.
    repeating = ("limit_train_batches", "reload_dataloaders_every_n_epochs")
    repeats = bool(trainer.get(repeating[0])) and trainer.get(repeating[1]) == 1
    for key, (allowed, instead) in TRAINER_OURS.items():
        if key not in arguments or arguments[key] == allowed or (repeats and key in repeating):
            continue
        if str(allowed).startswith("${stage.") and trainer[key] == OmegaConf.select(cfg, allowed[2:-1]):
            continue
        raise UserError(f"trainer.{key}={trainer[key]} has no effect here: {instead}")
    check_instance(arguments, "trainer")
    numbers = {key: trainer[key] for key in TrainerConfig.__dataclass_fields__ if key in arguments}
    build(TrainerConfig, numbers, "trainer")


def check_machine(trainer: DictConfig) -> None:
    """Check that this machine has the GPUs that the trainer asks for.

    Raises:
        UserError: it does not.
    """
    if str(trainer.get("accelerator")) not in ("gpu", "cuda"):
        return
    import torch

    available = torch.cuda.device_count()
    if not available:
        raise UserError(
            f"trainer.accelerator={trainer.accelerator}: PyTorch finds no GPU on this machine; trainer=cpu trains on "
            "the CPU"
        )
    count = count_devices(trainer.get("devices", 1)) or 1
    if count > available:
        raise UserError(f"trainer.devices={trainer.devices}: PyTorch finds {available} GPUs on this machine")


def check_train(cfg: DictConfig) -> None:
    """Check the keys, types and bounds of the whole conf/train.yaml.

    No file of data or weights is read, but for the sizes of a decoder that takes them from its
    weights (`model=auto`).

    Raises:
        UserError: the first key or value that is wrong.
    """
    sections = ("stage", "model", "data", "trainer", "callbacks", "logger", "plan_for", "benchmark")
    options = pick(TrainConfig, cfg, sections)  # before imports that take seconds
    with open_dict(cfg):
        for name, value in vars(options).items():
            if name not in cfg:  # removed by ~NAME
                cfg[name] = value

    from sphinx_pl.checkpoints.auto import fill_decoder
    from sphinx_pl.models.config import SphinxConfig
    from sphinx_pl.planning.rows import PlanConfig

    build(PlanConfig, cfg.plan_for, "plan_for")
    with open_dict(cfg):
        fill_decoder(cfg.model)
    SphinxConfig.from_dict(cfg.model)
    check_data(cfg)
    for key in ("tokenizer", "packing", "sources"):
        if cfg.data.get(key) is None:
            raise UserError(f"data.{key} is missing: each file of conf/data and conf/data/mixture has one")
    check_benchmark(cfg)
    _check_stage(cfg)
    check_trainer(cfg)
    for section in ("callbacks", "logger"):
        entries = _written(cfg, section)
        for name, entry in entries.items():
            if entry:
                others = [f"{section}.{other}" for other in entries if other != name]
                check_instance(entry, f"{section}.{name}", others)


def _written(cfg: DictConfig, section: str) -> dict[str, Any]:
    """Return a section with its interpolations.

    Some of them can be resolved only when a run starts.
    """
    values: Any = (
        OmegaConf.to_container(cfg[section]) if OmegaConf.is_config(cfg.get(section)) else cfg.get(section, {})
    )
    if not isinstance(values, dict):
        raise UserError(f"{section}={values} must be a mapping of keys to values")
    return values


def _check_stage(cfg: DictConfig) -> None:
    from sphinx_pl.stages.optim import OptimConfig

    section = cfg.get("stage")
    if not isinstance(section, DictConfig) or "_target_" not in section:
        raise UserError("stage has no _target_: choose one with stage=, such as stage=finetune")
    keys = stage_keys(str(section["_target_"]))
    refuse_unread(cfg, "stage", keys)
    # Keys that follow from others come last, since the others may be the mistake.
    follows = ("accumulate",)
    values = {key: section[key] for key in StageConfig.__dataclass_fields__ if key in section and key not in follows}
    build(StageConfig, values, "stage")
    build(OptimConfig, section.get("optim") or {}, "stage.optim")
    build(StageConfig, {key: section[key] for key in (*values, *follows) if key in section}, "stage")


def stage_keys(target: str) -> set[str]:
    """Return the keys of conf/stage/*.yaml for a class of stages."""
    from sphinx_pl.stages.stage import OTHERS_KEYS

    arguments = parameters(target) or set()
    return (arguments - {"model", "val_names"}) | {*OTHERS_KEYS, "_target_"}
