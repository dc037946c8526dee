"""conf/pipeline/ and a command line -> the steps of a recipe, each with its command and its composed configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from sphinx_pl.runtime.hydra_app import (
    MISTAKES,
    as_typed,
    check_packages,
    compose_config,
    explain_override,
    is_here,
    one_line,
)
from sphinx_pl.runtime.ranks import count_devices
from sphinx_pl.utils.config import CONFIG_FOLDER, build, refuse_unread
from sphinx_pl.utils.errors import UserError, suggest

SCRIPTS = {"train": "check_train", "mix_weights": "check_mix", "evaluate": "check_evaluate"}
"""What a step can run besides a module: they share Hydra's configuration, so theirs is composed beforehand."""

LAUNCHER = "launcher."
"""A step's override that begins so is for the launcher, not for the script."""

_FOR_STEPS = re.compile(r"([A-Za-z_]\w*):(.+)", re.DOTALL)

# Forms of SLURM's that can be meant in one way only.
_TIME = re.compile(r"\d+-\d+(:\d\d){0,2}|\d+:\d\d(:\d\d)?|UNLIMITED|INFINITE", re.IGNORECASE)

# What the pipeline decides itself, so that a command is the same for a new, a continued and a requeued attempt.
_OURS = {"train": ["ckpt_path=last"], "mix_weights": ["overwrite=true"], "evaluate": []}


@dataclass
class StepConfig:
    """The keys of an entry in `steps`, which conf/pipeline/main.yaml explains."""

    run: str
    arguments: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    makes: Optional[str] = None
    always: bool = False


@dataclass(frozen=True)
class Step:
    """One job of the chain.

    Attributes:
        command: what runs, its interpreter first.
        needs: steps that have to be done before.
        product: the file that is there when the step has done its work; its content tells one making from another.
        config: what the step does, as YAML. Another text is another step.
        folder: of a training run, whose checkpoints it goes on from; None for other steps.
        launcher: the launcher's options for this step.
        nodes: and `tasks` on each, from the trainer's configuration.
        gpus: of each node.
        script: of SCRIPTS, or "".
        written: its configuration before interpolations are resolved, as YAML.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    product: Path
    config: str
    always: bool = False
    folder: Path | None = None
    launcher: Mapping[str, Any] = field(default_factory=dict)
    nodes: int = 1
    tasks: int = 1
    gpus: int = 0
    script: str = ""
    written: str = ""

    @property
    def identity(self) -> str:
        """SHA-256 of `config`."""
        return hashlib.sha256(self.config.encode()).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """Steps in an order in which they can run, and where the pipeline keeps its own files."""

    name: str
    steps: dict[str, Step]
    folder: Path
    launcher: str
    redo: frozenset[str]
    keep: frozenset[str]
    dry: bool


def split(arguments: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """A command line -> overrides of conf/pipeline/main.yaml, and (step, script or `all`; override) pairs for steps."""
    own, theirs = [], []
    for argument in arguments:
        if found := _FOR_STEPS.fullmatch(argument):
            theirs.append((found[1], found[2]))
        else:
            own.append(argument)
    return own, theirs


def compose_pipeline(overrides: Sequence[str]) -> DictConfig:
    """conf/pipeline/main.yaml with the overrides.

    Raises:
        HydraException, UserError: an override that does not fit.
    """
    cfg = _compose(CONFIG_FOLDER / "pipeline", "main", overrides, _check_pipeline)
    check_packages(cfg.hydra)
    _check_pipeline(cfg)
    return cfg


def _check_pipeline(cfg: DictConfig) -> None:
    """Raises: UserError: a key that neither the pipeline nor an interpolation reads."""
    known = ("name", "output_dir", "steps", "redo", "keep", "dry", "launcher", "hydra")
    refuse_unread(cfg, "", known, CONFIG_FOLDER / "pipeline")
    launchers = {path.stem: path for path in (CONFIG_FOLDER / "pipeline" / "launcher").glob("*.yaml")}
    kind = str(cfg.launcher.get("kind"))
    if kind not in launchers:
        raise UserError(f"launcher.kind={kind}: {suggest(kind, launchers)}")
    refuse_unread(cfg, "launcher", [str(key) for key in OmegaConf.load(launchers[kind])])


def load(arguments: Sequence[str]) -> Recipe:
    """The recipe that a command line asks for, with every step's configuration composed and checked.

    Raises:
        UserError, HydraException: anything that is wrong with the recipe or with one of its steps, the step named.
    """
    own, theirs = split(arguments)
    cfg = compose_pipeline(own)
    written: Any = OmegaConf.to_container(cfg.steps, resolve=True)
    configs = {name: build(StepConfig, value, f"steps.{name}") for name, value in written.items() if value is not None}
    if not configs:
        raise UserError("this experiment has no steps")
    left_out = [name for name, value in written.items() if value is None]
    order = _order({name: _needs(name, config, configs, left_out) for name, config in configs.items()})
    used = {config.run for config in configs.values()}
    scripts = {name for name, config in configs.items() if config.run in SCRIPTS}
    for target, override in theirs:
        if target in left_out:
            raise UserError(f"{target}:{override} is for a step that is left out (steps.{target}=null)")
        if target not in configs and target not in used & set(SCRIPTS) and target != "all":
            raise UserError(f"{target}: is no step, nor a script of one; {suggest(target, [*configs, *used, 'all'])}")
    launcher: Any = OmegaConf.to_container(cfg.launcher, resolve=True)
    steps = {}
    for name in order:
        levels = dict.fromkeys(("all", configs[name].run, name))  # a step may be called like its script
        extra = [override for level in levels for to, override in theirs if to == level]
        needs = _needs(name, configs[name], configs, left_out)
        try:
            steps[name] = _step(name, configs[name], needs, extra, launcher)
        except MISTAKES as error:
            raise UserError(f"step {name}: {one_line(error)}") from error
    _check_products(steps)
    if any(step.gpus for step in steps.values()):
        # Scripts of one process want one where there are some, if nothing else was said.
        for step in [step for step in steps.values() if step.name in scripts and step.folder is None]:
            if step.launcher["gpus_per_node"] is None:
                steps[step.name] = dataclasses.replace(step, gpus=1)
    folder = Path(cfg.output_dir) / "pipeline"
    redo, keep = (_named(cfg[key], key, steps) for key in ("redo", "keep"))
    if both := redo & keep:
        raise UserError(f"redo and keep both name {', '.join(sorted(both))}")
    return Recipe(str(cfg.name), steps, folder, launcher["kind"], redo, keep, bool(cfg.dry))


def check_closely(recipe: Recipe) -> None:
    """What the scripts themselves refuse before they read any file: values that no choice of group or key shows.

    Takes seconds, since the scripts' libraries are imported.

    Raises:
        UserError: the step is named.
    """
    from sphinx_pl.models.config import SphinxConfig
    from sphinx_pl.settings.evaluate import EvaluateConfig
    from sphinx_pl.settings.mix_weights import MixConfig
    from sphinx_pl.stages import Stage
    from sphinx_pl.utils.config import pick

    for step in recipe.steps.values():
        cfg = OmegaConf.create(step.config)
        assert isinstance(cfg, DictConfig)
        try:
            if check := _check_step(step.script):
                written = OmegaConf.create(step.written)
                assert isinstance(written, DictConfig)
                check(written)
            if step.folder is not None:
                options: Any = OmegaConf.to_container(cfg.stage)
                keys = ("name", "train_parts", "optim", "max_steps")
                stage = Stage(SphinxConfig.from_dict(cfg.model), **{key: options[key] for key in keys})
                stage.resumed = True  # the weights to start from are another step's, and not there yet
                stage.check()
            elif "beta" in cfg:
                mixing = pick(MixConfig, cfg, ["data"])
                if not any(set(path) & set("*?[") for path in mixing.checkpoints):  # their number is known
                    mixing.recipe(len(mixing.checkpoints))
            elif "checkpoint" in cfg:
                pick(EvaluateConfig, cfg, ["data", "benchmark"])
                if not cfg.data.get("test"):
                    raise UserError("data.test is missing: choose a data= that has test sources")
        except MISTAKES as error:
            raise UserError(f"step {step.name}: {one_line(error)}") from error


def _compose(
    folder: Path, name: str, overrides: Sequence[str], check: Callable[[DictConfig], Any] | None = None
) -> DictConfig:
    given = as_typed(name, overrides)
    try:
        return compose_config(folder, name, given)
    except HydraException as error:
        raise explain_override(error, folder, name, given, check) or error from None


def _check_step(script: str) -> Callable[[DictConfig], Any] | None:
    """What raises a `UserError` for a configuration that a script does not take."""

    def check(cfg: DictConfig) -> None:
        getattr(import_module(f"sphinx_pl.settings.{script}"), SCRIPTS[script])(cfg)

    return check if script in SCRIPTS else None


def _needs(name: str, config: StepConfig, known: Mapping[str, Any], left_out: Sequence[str]) -> tuple[str, ...]:
    """`after` without steps that were left out (set to null)."""
    for need in config.after:
        if need not in known and need not in left_out:
            raise UserError(f"steps.{name}.after: no step '{need}'; {suggest(need, known)}")
    return tuple(need for need in config.after if need in known)


def _order(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Every step after those that it needs, otherwise as they are written."""
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        raise UserError(f"steps wait for each other: {' -> '.join(error.args[1])}") from None
    written = list(needs)
    ready: list[str] = []
    order = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=written.index)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


def _named(value: Any, key: str, steps: Mapping[str, Step]) -> frozenset[str]:
    """`redo` and `keep`: a name, a list of names, or all."""
    names = [value] if isinstance(value, str) else [str(name) for name in value or ()]
    if names == ["all"]:
        return frozenset(steps)
    for name in names:
        if name not in steps:
            raise UserError(f"{key}={name}: no such step; {suggest(name, [*steps, 'all'])}")
    return frozenset(names)


def _step(
    name: str, config: StepConfig, needs: tuple[str, ...], extra: Sequence[str], defaults: Mapping[str, Any]
) -> Step:
    launcher = dict(defaults)
    arguments = list(config.arguments)
    for override in extra:
        if override.startswith(LAUNCHER):
            parsed = OverridesParser.create().parse_override(override.removeprefix(LAUNCHER))
            if parsed.key_or_group not in launcher:
                raise UserError(f"{override}: {suggest(parsed.key_or_group, launcher)}")
            launcher[parsed.key_or_group] = parsed.value()
        elif config.run in SCRIPTS:
            arguments.append(override)
    _check_time(launcher)
    if config.run not in SCRIPTS:
        return _module_step(name, config, needs, extra, launcher)
    cfg = _compose(CONFIG_FOLDER, config.run, arguments, _check_step(config.run))
    check_packages(cfg.hydra)
    cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
    HydraConfig.instance().set_config(cfg)
    runs_in = Path(cfg.hydra.run.dir)
    with open_dict(cfg):
        del cfg["hydra"]
        written = OmegaConf.to_yaml(cfg)
        for key in {"ckpt_path", "overwrite"} & set(cfg):  # not what the step does
            cfg[key] = None if key == "ckpt_path" else False
        if config.run == "mix_weights":  # it reads no more of the data
            read = ("val_sources", "packing") if cfg.curve else ()
            cfg.data = {key: OmegaConf.to_container(cfg.data[key], resolve=True) for key in read}
    values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    made = {"train": _made_by_training, "mix_weights": _made_by_mixing, "evaluate": _made_by_evaluating}
    product = made[config.run](values, runs_in)
    command = [*interpreter(config.run), *arguments, *_OURS[config.run]]
    nodes, tasks, gpus = 1, 1, min(1, launcher.get("gpus_per_node") or 0)
    if config.run == "train":
        nodes, tasks, gpus = _size(values, launcher)
    return Step(
        name,
        tuple(command),
        needs,
        product,
        OmegaConf.to_yaml(OmegaConf.create(values), sort_keys=True),
        config.always,
        runs_in if config.run == "train" else None,
        launcher,
        nodes,
        tasks,
        gpus,
        config.run,
        written,
    )


def _check_time(launcher: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: SLURM would read another time than is meant. YAML makes 28800 of 8:00:00, which are minutes to SLURM.
    """
    time = launcher.get("time")
    if time is not None and not (isinstance(time, str) and _TIME.fullmatch(time)):
        raise UserError(
            f"launcher.time={time} must be hours or days, such as 8:00:00 or 2-00:00:00; in a YAML file in quotes"
        )


def _module_step(
    name: str, config: StepConfig, needs: tuple[str, ...], extra: Sequence[str], launcher: dict[str, Any]
) -> Step:
    try:
        found = find_spec(config.run)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(f"run={config.run} is no module, nor one of {', '.join(SCRIPTS)}")
    if not config.makes:
        raise UserError(f"steps.{name}.makes is missing: the file that is there when {config.run} has done its work")
    command = [sys.executable, "-m", config.run, *config.arguments]
    text = OmegaConf.to_yaml({"run": config.run, "arguments": list(config.arguments)})
    return Step(name, tuple(command), needs, Path(config.makes), text, config.always, launcher=launcher)


def interpreter(script: str) -> list[str]:
    """`python train.py` in the repository, `python -m sphinx_pl.cli.train` elsewhere."""
    return [sys.executable, *([f"{script}.py"] if is_here(script) else ["-m", f"sphinx_pl.cli.{script}"])]


def _made_by_training(cfg: dict[str, Any], folder: Path) -> Path:
    if not (cfg["callbacks"] or {}).get("export"):
        raise UserError("callbacks.export is missing: without it the next step finds no model")
    return folder / "model" / "provenance.json"


def _made_by_mixing(cfg: dict[str, Any], folder: Path) -> Path:
    if cfg["out"]:
        return Path(cfg["out"]) / "provenance.json"
    if not cfg["curve_dir"]:
        raise UserError("mix_weights.py has nothing to write: give it out=FOLDER or curve_dir=FOLDER")
    return Path(cfg["curve_dir"]) / "curve.json"


def _made_by_evaluating(cfg: dict[str, Any], folder: Path) -> Path:
    if not cfg["out"]:
        raise UserError("evaluate.py needs out=FOLDER, where the pipeline looks for its results")
    return Path(cfg["out"]) / "results.json"


def _size(cfg: Mapping[str, Any], launcher: Mapping[str, Any]) -> tuple[int, int, int]:
    """Nodes, tasks and GPUs of each node, from the trainer: said once, so that both cannot differ.

    Raises:
        UserError: a launcher that asks for machines is to start as many processes as there are devices.
    """
    trainer = cfg["trainer"]
    devices = trainer.get("devices", 1)
    if launcher["kind"] == "local":
        return 1, 1, 0
    if (tasks := count_devices(devices)) is None:
        raise UserError(f"trainer.devices={devices}: SLURM has to know how many, such as train:trainer.devices=8")
    gpus = launcher.get("gpus_per_node")
    if gpus is None:
        gpus = tasks if trainer.get("accelerator") in ("gpu", "cuda") else 0
    return int(trainer.get("num_nodes", 1)), tasks, int(gpus)


def _check_products(steps: Mapping[str, Step]) -> None:
    """No two steps write the same place.

    Raises:
        UserError: two do.
    """
    owner: dict[Path, str] = {}
    for step in steps.values():
        other = owner.setdefault(step.product.absolute(), step.name)
        if other != step.name:
            raise UserError(f"steps {other} and {step.name} both make {step.product}: give one another run= or out=")
