"""What each script reads of its configuration. A key that nothing reads is refused, with the nearest one that is.

Two kinds of things read keys: dataclasses (`sphinx_pl.typed.build`) and what Hydra instantiates, whose signature says
which keys it has. Imports of what is large happen inside the functions.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError

from sphinx_pl.errors import UserError, suggest
from sphinx_pl.processes import count_devices
from sphinx_pl.typed import build, pick, refuse_unread, unknown_key, within

SEEDS = 2**32 - 1
"""The largest seed that NumPy takes."""


@dataclass
class TrainConfig:
    """The keys of conf/train.yaml that are in no group, with their types; that file explains them."""

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
    """The keys of conf/stage/*.yaml with their types and bounds. A stage of one's own may have further ones."""

    name: str
    train_parts: list[str]
    optim: dict[str, Any]
    max_steps: int = within(at_least=1)
    text_required: bool = True
    init_from: Optional[str] = None
    rows_per_step: Optional[int] = within(None, at_least=1)
    accumulate: int = within(1, at_least=1)
    clip: Optional[float] = within(None, at_least=0)
    checkpointing: str = "none"
    max_nonfinite: int = within(10, at_least=0)
    val_every: int = within(0, at_least=0)


@dataclass
class TrainerConfig:
    """Numbers of the trainer that Lightning does not check itself before training."""

    max_steps: int = within(1, at_least=1)
    num_nodes: int = within(1, at_least=1)
    log_every_n_steps: int = within(50, at_least=1)


# -- what Hydra instantiates -------------------------------------------------------------------------------------------

_HYDRAS = ("_target_", "_convert_", "_recursive_", "_partial_", "_args_")
_FURTHER: dict[str, tuple[str, ...]] = {
    "callbacks.wandb_logger.RunLogger": ("lightning.pytorch.loggers.WandbLogger", "wandb.init"),
    "lightning.pytorch.loggers.TensorBoardLogger": ("torch.utils.tensorboard.SummaryWriter",),
    "lightning.pytorch.strategies.DDPStrategy": ("torch.nn.parallel.DistributedDataParallel",),
    # Lightning's own options have no effect there, or another value would break them.
    "sphinx_pl.distributed.zero.Zero3": (),
    "sphinx_pl.distributed.fsdp2.Fsdp2": (),
}
"""Where the `**options` of a class go to."""


def parameters(target: str) -> set[str] | None:
    """The keys that a class or function takes; None: it takes any.

    Raises:
        UserError: there is no such class.
    """
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception as error:  # whatever an import raises
        raise UserError(f"_target_={target} cannot be imported ({str(error).splitlines()[0]})") from None
    names: set[str] = set()
    for function in _constructors(found):
        given = inspect.signature(function).parameters.values()
        names.update(p.name for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in given):
            return names - {"self"}
        name = f"{found.__module__}.{found.__qualname__}"
        for known in {target, name} & set(_FURTHER):
            for further in _FURTHER[known]:
                try:
                    names.update(parameters(further) or ())
                except UserError:
                    return None  # an extra that is not installed: it is named when it is needed
            return names - {"self"}
    return None if names or not inspect.isclass(found) else set()


def hints(target: str) -> dict[str, Any]:
    """The types of what a class or function takes, as far as they are written down."""
    from hydra.utils import get_object

    found: dict[str, Any] = {}
    for function in _constructors(get_object(target)):
        with contextlib.suppress(Exception):  # names that exist only for type checkers
            found = get_type_hints(function) | found
    return found


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _choices(hint: Any) -> list[Any] | None:
    """The plain types and values that a type hint allows; None: others too, which are not checked."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_choices(part) for part in get_args(hint)]
        return None if None in parts else [choice for part in parts for choice in part or ()]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [hint] if hint in _NAMES else None


def _fits(value: Any, choices: Iterable[Any]) -> bool:
    kinds = {type(value), *([float] if type(value) is int else [])}
    return any(choice in kinds if choice in _NAMES else choice == value for choice in choices)


def _constructors(found: Any) -> Iterable[Callable[..., Any]]:
    """A function, or the `__init__` of a class and of its bases, which get what it passes on."""
    if not inspect.isclass(found):
        return [found]
    return [base.__dict__["__init__"] for base in found.__mro__[:-1] if "__init__" in base.__dict__] or [lambda: None]


def check_instance(values: Any, key: str, siblings: Iterable[str] = ()) -> None:
    """Whether what Hydra is to instantiate has the keys of `values`, of the right types; also what is inside of it.

    Args:
        siblings: full keys of what there is beside it.

    Raises:
        UserError: an unknown key, a value of another type, or no `_target_`.
    """
    if "_target_" not in values:
        hint = suggest(key, siblings) if siblings else "it says which class it is"
        raise UserError(f"{key} has no _target_: {hint}")
    try:
        known = parameters(str(values["_target_"]))
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    typed = hints(str(values["_target_"]))
    for name, value in values.items():
        if known is not None and name not in known and name not in _HYDRAS:
            raise UserError(unknown_key(f"{key}.{name}", [f"{key}.{one}" for one in known]))
        choices = _choices(typed.get(name, Any))
        if choices is not None and "${" not in str(value) and not _fits(value, choices):
            must = ", ".join(dict.fromkeys(_NAMES.get(choice, str(choice)) for choice in choices))
            raise UserError(f"{key}.{name}={'null' if value is None else value} must be one of: {must}")
        for number, one in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(one, Mapping) and "_target_" in one:
                check_instance(one, f"{key}.{name}" if one is value else f"{key}.{name}[{number}]")


# -- the trainer -------------------------------------------------------------------------------------------------------

TRAINER_WORKS = frozenset(
    {
        *("accelerator", "strategy", "devices", "num_nodes", "precision", "max_steps", "max_time"),
        *("limit_val_batches", "val_check_interval", "log_every_n_steps", "enable_model_summary"),
        *("deterministic", "benchmark", "inference_mode", "profiler", "detect_anomaly", "plugins"),
    }
)
"""Arguments of Lightning's Trainer that do here what Lightning says."""

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
    "accumulate_grad_batches": ("${stage.accumulate}", "set stage.accumulate or stage.rows_per_step"),
    "gradient_clip_val": ("${stage.clip}", "set stage.clip"),
    "gradient_clip_algorithm": (None, "gradients are clipped by their global norm; stage.clip sets it"),
    "use_distributed_sampler": (False, "the data module gives each rank its own part"),
    "barebones": (False, "leave out loggers and callbacks with logger= and callbacks="),
    "sync_batchnorm": (False, "the model has no batch normalization"),
    "default_root_dir": ("${hydra:runtime.output_dir}", "set output_dir, name or run"),
    "enable_autolog_hparams": (True, "callbacks.provenance logs the configuration"),
    "model_registry": (None, "callbacks.export writes the model"),
}
"""Arguments that the data, the stage or callbacks take the place of: the only value that they may have, and what to do
instead."""


def check_trainer(cfg: DictConfig) -> None:
    """Whether all that the trainer is given has an effect.

    Raises:
        UserError: it names what to do instead.
    """
    trainer, written = cfg.trainer, _written(cfg, "trainer")
    # debug=overfit: a loader that begins at the start again makes every epoch of one step the same.
    repeating = ("limit_train_batches", "reload_dataloaders_every_n_epochs")
    repeats = bool(trainer.get(repeating[0])) and trainer.get(repeating[1]) == 1
    for key, (allowed, instead) in TRAINER_OURS.items():
        if key not in written or written[key] == allowed or (repeats and key in repeating):
            continue
        if str(allowed).startswith("${stage.") and trainer[key] == OmegaConf.select(cfg, allowed[2:-1]):
            continue
        raise UserError(f"trainer.{key}={trainer[key]} has no effect here: {instead}")
    check_instance(written, "trainer")
    numbers = {key: trainer[key] for key in TrainerConfig.__dataclass_fields__ if key in written}
    build(TrainerConfig, numbers, "trainer")


def check_machine(trainer: DictConfig) -> None:
    """Whether this machine has the GPUs that the trainer asks for.

    Raises:
        UserError: it does not.
    """
    if str(trainer.get("accelerator")) not in ("gpu", "cuda"):
        return
    import torch

    there = torch.cuda.device_count()
    if not there:
        raise UserError(
            f"trainer.accelerator={trainer.accelerator}: PyTorch finds no GPU on this machine; trainer=cpu trains on "
            "the CPU"
        )
    wanted = count_devices(trainer.get("devices", 1)) or 1
    if wanted > there:
        raise UserError(f"trainer.devices={trainer.devices}: PyTorch finds {there} GPUs on this machine")


# -- sections ----------------------------------------------------------------------------------------------------------


def check_data(cfg: DictConfig) -> None:
    """The section `data`: keys, types and bounds, also of sources, whose files are not looked at.

    Raises:
        UserError: what does not fit.
    """
    from sphinx_pl.data.datamodule import DataConfig
    from sphinx_pl.data.mixture import META, Group, SourceConfig, is_absent

    known = list(DataConfig.__dataclass_fields__)
    refuse_unread(cfg, "data", known)
    values: dict[str, Any] = {}
    for key in [key for key in known if key in cfg.data]:
        with contextlib.suppress(InterpolationKeyError):  # of a key that only other scripts have, such as `seed`
            value = cfg.data[key]
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    build(DataConfig, values, "data")
    for section in ("sources", "val_sources", "test"):
        sources = values.get(section)
        if sources is None:
            continue
        if not isinstance(sources, Mapping):
            raise UserError(f"data.{section} must be a mapping of names to sources")
        for name, source in sources.items():
            if isinstance(source, Mapping) and not {"kind", "path", "sources"} & set(source):
                others = [f"data.{section}.{other}" for other in sources if other != name]
                raise UserError(
                    f"data.{section}.{name} has no kind and no path: {suggest(f'data.{section}.{name}', others)}"
                )
            grouped = isinstance(source, Mapping) and ("sources" in source or source.get("kind") == META)
            if section == "sources" or grouped:
                if not (isinstance(source, Mapping) and source.get("kind") == META):  # it reads a file
                    Group.from_dict({"sources": {name: source}})
            elif not is_absent(source):
                if not isinstance(source, Mapping):
                    raise UserError(f"data.{section}.{name} must be a mapping with kind and path")
                SourceConfig.from_dict(str(name), source, section)


def check_benchmark(cfg: DictConfig) -> None:
    """The section `benchmark`.

    Raises:
        UserError: an unknown key of an entry.
    """
    from sphinx_pl.evaluation.benchmarks import ROOT, BenchmarkConfig

    for name, entry in (cfg.get("benchmark") or {}).items():
        if name != ROOT and isinstance(entry, DictConfig):
            refuse_unread(cfg, f"benchmark.{name}", BenchmarkConfig.__dataclass_fields__)


def check_train(cfg: DictConfig) -> None:
    """The whole of conf/train.yaml: keys, types and bounds. No file of data or weights is looked at.

    Raises:
        UserError: the first thing that does not fit.
    """
    sections = ("stage", "model", "data", "trainer", "callbacks", "logger", "plan_for", "benchmark")
    options = pick(TrainConfig, cfg, sections)  # before what takes seconds to import
    with open_dict(cfg):
        for name, value in vars(options).items():
            if name not in cfg:  # left out by ~NAME
                cfg[name] = value

    from sphinx_pl.models.config import SphinxConfig
    from sphinx_pl.plan import PlanConfig

    build(PlanConfig, cfg.plan_for, "plan_for")
    SphinxConfig.from_dict(cfg.model)
    check_data(cfg)
    for key in ("tokenizer", "packing", "sources"):
        if cfg.data.get(key) is None:
            raise UserError(f"data.{key} is missing: conf/data and conf/data/mixture have one in each of their files")
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
    """A section with its interpolations: some can be resolved only where a run starts."""
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
    known = stage_keys(str(section["_target_"]))
    refuse_unread(cfg, "stage", known)
    # What follows from others comes last: they may be what is wrong.
    follows = ("accumulate",)
    given = {key: section[key] for key in StageConfig.__dataclass_fields__ if key in section and key not in follows}
    build(StageConfig, given, "stage")
    build(OptimConfig, section.get("optim") or {}, "stage.optim")
    build(StageConfig, {key: section[key] for key in (*given, *follows) if key in section}, "stage")


def stage_keys(target: str) -> set[str]:
    """The keys of conf/stage/*.yaml for a class of stages."""
    from sphinx_pl.stages.stage import OTHERS_KEYS

    given = parameters(target) or set()
    return (given - {"model", "val_names"}) | {*OTHERS_KEYS, "_target_"}


def names_section(overrides: Iterable[str], section: str) -> bool:
    """Whether overrides choose or change a section."""
    keys = (override.lstrip("+~").partition("=")[0] for override in overrides)
    return any(key == section or key.startswith((f"{section}.", f"{section}/", f"{section}@")) for key in keys)


# -- files -------------------------------------------------------------------------------------------------------------

_PACKAGES = {"data/mixture": "data", "experiment": "_global_", "debug": "_global_"}
"""Groups whose files are not about the section that the group is named after."""


def check_packages(hydra: DictConfig) -> None:
    """Whether the chosen files say which section they belong to, where that is not the one of their folder.

    Raises:
        UserError: the line that a file has to begin with.
    """
    folders = [Path(str(source.path)) for source in hydra.runtime.config_sources if source.schema == "file"]
    for group, package in _PACKAGES.items():
        name = hydra.runtime.choices.get(group)
        files = [folder / group / f"{name}.yaml" for folder in folders]
        for file in [file for file in files if file.is_file()][:1]:
            text = file.read_text(encoding="utf-8", errors="replace")
            said = re.findall(r"^# *@package +(\S+)", text, re.MULTILINE)
            if said != [package]:
                has = f"says '# @package {said[0]}'" if said else "has no such line"
                raise UserError(f"{file}: its first line must be '# @package {package}', and it {has}")
