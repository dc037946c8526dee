"""The steps of a recipe, with their configurations, from conf/pipeline/ and a command line."""

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

from sphinx_pl.runtime.command_line import as_typed
from sphinx_pl.runtime.hydra_app import is_here
from sphinx_pl.runtime.overrides import MISTAKES, check_packages, compose_config, explain_override, one_line
from sphinx_pl.runtime.ranks import count_devices
from sphinx_pl.utils.config import CONFIG_FOLDER, build, refuse_unread
from sphinx_pl.utils.errors import UserError, suggest

SCRIPTS = {"train": "check_train", "mix_weights": "check_mix", "evaluate": "check_evaluate"}
"""Scripts that a step can run besides modules.

They use Hydra, so their configuration is composed in advance.
"""

LAUNCHER = "launcher."
"""A step's override with this prefix is for the launcher, not for the script."""

_FOR_STEPS = re.compile(r"([A-Za-z_]\w*):(.+)", re.DOTALL)

# SLURM's time formats that are unambiguous.
_TIME = re.compile(r"\d+-\d+(:\d\d){0,2}|\d+:\d\d(:\d\d)?|UNLIMITED|INFINITE", re.IGNORECASE)

# The pipeline sets these itself, so a command is the same for a new, a resumed and a requeued
# attempt.
_FIXED = {"train": ["ckpt_path=last"], "mix_weights": ["overwrite=true"], "evaluate": []}


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
        command: the command, beginning with the interpreter.
        needs: steps that must be done before.
        product: the file that exists when the step is done. Its content distinguishes two attempts.
        config: the step's configuration as YAML. A step with another text is another step.
        folder: the folder of a training run, from whose checkpoints it resumes; None for other
            steps.
        launcher: the launcher's options for this step.
        nodes: number of nodes, from the trainer's configuration.
        tasks: number of tasks on each node.
        gpus: number of GPUs of each node.
        script: a name in SCRIPTS, or "".
        written: the configuration before interpolations are resolved, as YAML.
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
        """The SHA-256 of `config`."""
        return hashlib.sha256(self.config.encode()).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """The steps in an order in which they can run, and the folder for the pipeline's own files."""

    name: str
    steps: dict[str, Step]
    folder: Path
    launcher: str
    redo: frozenset[str]
    keep: frozenset[str]
    dry: bool


def split(arguments: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split a command line into overrides of conf/pipeline/main.yaml and overrides of steps.

    Returns:
        The first kind, and pairs of (step, script or `all`; override).
    """
    own, theirs = [], []
    for argument in arguments:
        if match := _FOR_STEPS.fullmatch(argument):
            theirs.append((match[1], match[2]))
        else:
            own.append(argument)
    return own, theirs


def compose_pipeline(overrides: Sequence[str]) -> DictConfig:
    """Return conf/pipeline/main.yaml with the overrides.

    Raises:
        HydraException, UserError: an override does not fit.
    """
    cfg = _compose(CONFIG_FOLDER / "pipeline", "main", overrides, _check_pipeline)
    check_packages(cfg.hydra)
    _check_pipeline(cfg)
    return cfg


def _check_pipeline(cfg: DictConfig) -> None:
    """Check the keys of the pipeline's configuration.

    Raises:
        UserError: neither the pipeline nor an interpolation reads a key.
    """
    keys = ("name", "output_dir", "steps", "redo", "keep", "dry", "launcher", "hydra")
    refuse_unread(cfg, "", keys, CONFIG_FOLDER / "pipeline")
    launchers = {path.stem: path for path in (CONFIG_FOLDER / "pipeline" / "launcher").glob("*.yaml")}
    kind = str(cfg.launcher.get("kind"))
    if kind not in launchers:
        raise UserError(f"launcher.kind={kind}: {suggest(kind, launchers)}")
    refuse_unread(cfg, "launcher", [str(key) for key in OmegaConf.load(launchers[kind])])


def load(arguments: Sequence[str]) -> Recipe:
    """Return the recipe that a command line asks for.

    Every step's configuration is composed and checked.

    Raises:
        UserError, HydraException: the recipe or one of its steps is wrong. The message names the
            step.
    """
    own, theirs = split(arguments)
    cfg = compose_pipeline(own)
    written: Any = OmegaConf.to_container(cfg.steps, resolve=True)
    configs = {name: build(StepConfig, value, f"steps.{name}") for name, value in written.items() if value is not None}
    if not configs:
        raise UserError("this experiment has no steps")
    omitted = [name for name, value in written.items() if value is None]
    order = _order({name: _needs(name, config, configs, omitted) for name, config in configs.items()})
    used = {config.run for config in configs.values()}
    scripts = {name for name, config in configs.items() if config.run in SCRIPTS}
    for target, override in theirs:
        if target in omitted:
            raise UserError(f"{target}:{override} is for a step that is omitted (steps.{target}=null)")
        if target not in configs and target not in used & set(SCRIPTS) and target != "all":
            raise UserError(f"{target}: is neither a step nor a script; {suggest(target, [*configs, *used, 'all'])}")
    launcher: Any = OmegaConf.to_container(cfg.launcher, resolve=True)
    steps = {}
    for name in order:
        # A step may have the name of its script.
        levels = dict.fromkeys(("all", configs[name].run, name))
        extra = [override for level in levels for to, override in theirs if to == level]
        needs = _needs(name, configs[name], configs, omitted)
        try:
            steps[name] = _step(name, configs[name], needs, extra, launcher)
        except MISTAKES as error:
            raise UserError(f"step {name}: {one_line(error)}") from error
    _check_products(steps)
    if any(step.gpus for step in steps.values()):
        # Scripts of one process get one GPU if other steps use GPUs, unless the launcher sets a
        # number.
        for step in [step for step in steps.values() if step.name in scripts and step.folder is None]:
            if step.launcher["gpus_per_node"] is None:
                steps[step.name] = dataclasses.replace(step, gpus=1)
    folder = Path(cfg.output_dir) / "pipeline"
    redo, keep = (_named(cfg[key], key, steps) for key in ("redo", "keep"))
    if both := redo & keep:
        raise UserError(f"redo and keep both name {', '.join(sorted(both))}")
    return Recipe(str(cfg.name), steps, folder, launcher["kind"], redo, keep, bool(cfg.dry))


def check_closely(recipe: Recipe) -> None:
    """Check the values that the scripts refuse before they read any file.

    This takes seconds, since it imports the scripts' libraries.

    Raises:
        UserError: a value is refused. The message names the step.
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
                # Another step makes the initial weights, which do not exist yet.
                stage.resumed = True
                stage.check()
            elif "beta" in cfg:
                mixing = pick(MixConfig, cfg, ["data"])
                # Without a pattern the number of checkpoints is known.
                if not any(set(path) & set("*?[") for path in mixing.checkpoints):
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
    arguments = as_typed(name, overrides)
    try:
        return compose_config(folder, name, arguments)
    except HydraException as error:
        raise explain_override(error, folder, name, arguments, check) or error from None


def _check_step(script: str) -> Callable[[DictConfig], Any] | None:
    """A function that raises a `UserError` for a configuration that the script refuses."""

    def check(cfg: DictConfig) -> None:
        getattr(import_module(f"sphinx_pl.settings.{script}"), SCRIPTS[script])(cfg)

    return check if script in SCRIPTS else None


def _needs(name: str, config: StepConfig, names: Mapping[str, Any], left_out: Sequence[str]) -> tuple[str, ...]:
    """Return `after` without the omitted steps (set to null)."""
    for need in config.after:
        if need not in names and need not in left_out:
            raise UserError(f"steps.{name}.after: there is no step '{need}'; {suggest(need, names)}")
    return tuple(need for need in config.after if need in names)


def _order(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return every step after the steps that it needs, otherwise in the order of the file."""
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        raise UserError(f"steps wait for each other: {' -> '.join(error.args[1])}") from None
    names = list(needs)
    ready: list[str] = []
    order = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=names.index)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


def _named(value: Any, key: str, steps: Mapping[str, Step]) -> frozenset[str]:
    """Return the steps of `redo` or `keep`: a name, a list of names, or all."""
    names = [value] if isinstance(value, str) else [str(name) for name in value or ()]
    if names == ["all"]:
        return frozenset(steps)
    for name in names:
        if name not in steps:
            raise UserError(f"{key}={name}: there is no such step; {suggest(name, [*steps, 'all'])}")
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
        for key in {"ckpt_path", "overwrite"} & set(cfg):  # they do not change what the step does
            cfg[key] = None if key == "ckpt_path" else False
        if config.run == "mix_weights":  # it reads only these keys of the data
            keys = ("val_sources", "packing") if cfg.curve else ()
            cfg.data = {key: OmegaConf.to_container(cfg.data[key], resolve=True) for key in keys}
    values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    products = {"train": _product_of_training, "mix_weights": _product_of_mixing, "evaluate": _product_of_evaluation}
    product = products[config.run](values, runs_in)
    command = [*interpreter(config.run), *arguments, *_FIXED[config.run]]
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
    """Check the launcher's `time`.

    Raises:
        UserError: SLURM would read another time than the user meant. YAML turns 8:00:00 into 28800,
            which SLURM reads as minutes.
    """
    time = launcher.get("time")
    if time is not None and not (isinstance(time, str) and _TIME.fullmatch(time)):
        raise UserError(
            f"launcher.time={time} must be hours or days, such as 8:00:00 or 2-00:00:00; quote it in a YAML file"
        )


def _module_step(
    name: str, config: StepConfig, needs: tuple[str, ...], extra: Sequence[str], launcher: dict[str, Any]
) -> Step:
    try:
        spec = find_spec(config.run)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise UserError(f"run={config.run} is neither a module nor one of {', '.join(SCRIPTS)}")
    if not config.makes:
        raise UserError(f"steps.{name}.makes is missing: name the file that {config.run} writes at its end")
    command = [sys.executable, "-m", config.run, *config.arguments]
    text = OmegaConf.to_yaml({"run": config.run, "arguments": list(config.arguments)})
    return Step(name, tuple(command), needs, Path(config.makes), text, config.always, launcher=launcher)


def interpreter(script: str) -> list[str]:
    """Return `python train.py` in the repository, and `python -m sphinx_pl.cli.train` elsewhere."""
    return [sys.executable, *([f"{script}.py"] if is_here(script) else ["-m", f"sphinx_pl.cli.{script}"])]


def _product_of_training(cfg: dict[str, Any], folder: Path) -> Path:
    if not (cfg["callbacks"] or {}).get("export"):
        raise UserError("callbacks.export is missing: without it the next step finds no model")
    return folder / "model" / "provenance.json"


def _product_of_mixing(cfg: dict[str, Any], folder: Path) -> Path:
    if cfg["out"]:
        return Path(cfg["out"]) / "provenance.json"
    if not cfg["curve_dir"]:
        raise UserError("mix_weights.py has nothing to write: give it out=FOLDER or curve_dir=FOLDER")
    return Path(cfg["curve_dir"]) / "curve.json"


def _product_of_evaluation(cfg: dict[str, Any], folder: Path) -> Path:
    if not cfg["out"]:
        raise UserError("evaluate.py needs out=FOLDER, since the pipeline reads its results there")
    return Path(cfg["out"]) / "results.json"


def _size(cfg: Mapping[str, Any], launcher: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the nodes, and the tasks and GPUs of each node.

    They follow from the trainer's configuration.

    Raises:
        UserError: the number of devices depends on the machine, but SLURM must know it.
    """
    trainer = cfg["trainer"]
    devices = trainer.get("devices", 1)
    if launcher["kind"] == "local":
        return 1, 1, 0
    if (tasks := count_devices(devices)) is None:
        raise UserError(f"trainer.devices={devices}: SLURM needs a number, such as train:trainer.devices=8")
    gpus = launcher.get("gpus_per_node")
    if gpus is None:
        gpus = tasks if trainer.get("accelerator") in ("gpu", "cuda") else 0
    return int(trainer.get("num_nodes", 1)), tasks, int(gpus)


def _check_products(steps: Mapping[str, Step]) -> None:
    """Check that no two steps write to the same place.

    Raises:
        UserError: two steps do.
    """
    owner: dict[Path, str] = {}
    for step in steps.values():
        other = owner.setdefault(step.product.absolute(), step.name)
        if other != step.name:
            raise UserError(f"steps {other} and {step.name} both make {step.product}: give one another run= or out=")
