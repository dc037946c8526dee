"""Entry scripts: Hydra's `main`, with mistakes answered in one line."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sphinx_pl.runtime.ranks import count_devices, first_process
from sphinx_pl.utils.config import CONFIG_FOLDER, all_keys, escaped, unknown_key
from sphinx_pl.utils.errors import UserError, nearest_key, suggest

TYPED = {
    "train": ("output_dir", "ckpt_path", "data.root", "data.tokenizer", "stage.init_from"),
    "chat": ("checkpoint", "image", "question", "sam"),
    "evaluate": ("checkpoint", "out", "report", "mixture_out", "data.root", "benchmark.root"),
    "mix_weights": ("base", "out", "curve_dir", "data.root"),
}
"""Keys of each script whose values people type: they are taken as they are, without Hydra's grammar."""
_SENTENCES = ("question",)
"""Those that are no paths: even quotes and `${` stay in them."""
TRACEBACK = "SPHINX_TRACEBACK"
FAILED = "SPHINX_STEP_FAILED"
MISTAKES = (UserError, HydraException, InstantiationException, OmegaConfBaseException)
INTERRUPTED = 128 + signal.SIGINT
"""Exit code, as a shell's."""


INSTALLED = {"train": "sphinx-train", "mix_weights": "sphinx-mix", "evaluate": "sphinx-evaluate", "chat": "sphinx-chat"}
"""The command that an installation has for each script of the repository."""


def is_here(script: str) -> bool:
    """Whether the working folder is the repository, so that `python train.py` runs this code."""
    file = Path(f"{script}.py")
    return file.is_file() and file.resolve() == CONFIG_FOLDER.parent.parent / file


def command_of(script: str) -> str:
    """`python train.py` in the repository, the installed command `sphinx-train` elsewhere."""
    return f"python {script}.py" if is_here(script) else INSTALLED[script]


def one_line(error: BaseException) -> str:
    """The sentence to print. Hydra wraps errors of what it instantiates; the cause is what the user did."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return " ".join(str(cause).split())
        cause = cause.__cause__
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        # What the library says, and of which part of the configuration.
        found = re.search(r"full_key: (\S+)", str(error))
        target = re.search(r"'([\w.]+)'", str(error))
        place = found[1] if found else target[1] if target else "a _target_"
        return f"{place}: {' '.join(str(error.__cause__).split()) or type(error.__cause__).__name__}"
    if isinstance(error, MissingConfigException):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = error.options or [file.stem for file in (CONFIG_FOLDER / group).glob("*.yaml")]  # none: in a list
        return f"{group}={option}: there is no file {group}/{option}.yaml; {suggest(option, options)}"
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return f"'{error.override}' is no override: write key=value, without spaces around ="
        quoted = shlex.quote(f"{key}={literal(value)}")
        return f"{error.override}: Hydra cannot read this value; as text it is {quoted}"
    said = str(error)
    if found := re.match(r"Ambiguous value for argument '(.+?)=(.+)'", said):
        key, values = found.groups()
        return f"{key}={values}: for a list write {key}=[{values}], for a run with each value add -m"
    if said.startswith("Error merging override") and error.__cause__ is not None:
        said += f": {error.__cause__}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("object_type", "reference_type"))]
    return "; ".join(kept) or type(error).__name__


def report(error: BaseException) -> int:
    """Print the error as one line on stderr; returns the exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


def _validation_interval(every: int, max_steps: int, accumulate: int) -> int:
    """Optimizer steps between validations (0: only at the end) in micro-batches, Lightning's unit."""
    return int(every or max_steps) * int(accumulate)


def _micro_batches(rows_per_step: int | None, rows: int, devices: Any, num_nodes: int) -> int:
    """Of an optimizer step on each rank, so that all ranks together have `rows_per_step` rows in it."""
    if rows_per_step is None:
        return 1
    if (per_node := count_devices(devices)) is None:  # as many as there are
        import torch

        per_node = max(1, torch.cuda.device_count())
    at_once = int(rows) * per_node * int(num_nodes)
    if rows_per_step % at_once:
        raise UserError(
            f"stage.rows_per_step={rows_per_step} is not a multiple of data.packing.rows={rows} * {per_node} * "
            f"{num_nodes} (trainer.devices, trainer.num_nodes): change one of them, or set stage.accumulate instead"
        )
    return int(rows_per_step) // at_once


def _mixed_precision(accelerator: str) -> str:
    """bf16 autocast over fp32 weights; fp32 on a CPU without bf16 instructions, where bf16 takes twice as long."""
    import torch

    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        about = Path("/proc/cpuinfo")
        words = about.read_text().split() if about.exists() else ()
        return "bf16-mixed" if {"avx512_bf16", "amx_bf16"}.intersection(words) else "32-true"
    return "bf16-mixed"


def _run_folder(plan: bool, folder: str) -> str:
    """Hydra writes into a run's folder before the script begins: a plan, which is to leave none, gets one that goes."""
    if not plan:
        return folder
    temporary = tempfile.mkdtemp(prefix="plan-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def literal(text: str) -> str:
    """As a value of Hydra's grammar that means exactly this text."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + (r"\'" if found[2] else ""), escaped(text)) + "'"


_OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][\w./]*(@[\w.:]*)?=")
_OPTION = re.compile(r"(--?[A-Za-z][\w-]*|~[A-Za-z_][\w./]*(@[\w.:]*)?)(=.*)?", re.DOTALL)
"""An option of Hydra's, or a key that is left out: both are one word."""


def as_typed(script: str, arguments: Sequence[str]) -> list[str]:
    """A command line whose text and paths (`TYPED`) Hydra takes as they are.

    A path may still be an interpolation (`out=mixed_${beta}`), or in quotes as Hydra wants them. In a sweep all of it
    is left to Hydra, for which a comma separates values.
    """
    if {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    return [_as_typed(script, argument) for argument in arguments]


def _as_typed(script: str, argument: str) -> str:
    name, equals, value = argument.partition("=")
    key = name.lstrip("+")
    if not equals or key not in TYPED.get(script, ()) or value in ("", "null"):
        return argument
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if key not in _SENTENCES and (quoted or "${" in value):
        return argument
    # Three question marks alone mean to OmegaConf that there is no value.
    return f"{name}={literal(value if value != '???' else value + ' ')}"


def take_rest(arguments: Sequence[str], key: str, known: Iterable[str]) -> list[str]:
    """A command line whose last words are the value of `key`: all from the first that is neither key=value nor an
    option. After `--` everything is.

    Args:
        known: the script's own keys, to notice one that stands behind the words.

    Raises:
        UserError: such a key, or the value is given twice.
    """
    given = list(arguments)
    start = next(
        (n for n, one in enumerate(given) if one == "--" or not (_OPTION.fullmatch(one) or _OVERRIDE.match(one))), None
    )
    if start is None or any(one.startswith("-") for one in given[:start]):
        return given  # an option of Hydra's may have a value of its own: `--cfg job`
    options, words = given[:start], given[start:]
    if words[0] == "--":
        words = words[1:]
    else:
        for word in words:
            if word.partition("=")[0].partition(".")[0] in known and "=" in word:
                raise UserError(f"{word} stands behind the {key}: put it before, or -- in front of the {key}")
    if any(one.startswith(f"{key}=") for one in options):
        raise UserError(f"'{' '.join(words)}' stands beside {key}=: give one of them")
    return [*options, f"{key}={' '.join(words)}"] if words else options


def compose_config(folder: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    """A configuration as the scripts get it, with Hydra's own section.

    Raises:
        UserError: an override that does not fit, and what was probably meant.
        HydraException: what Hydra itself says in a way that helps.
    """
    register_resolvers()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            cfg: DictConfig = hydra.compose(name, overrides=list(overrides), return_hydra_config=True)
    except ValueError as error:  # Hydra's for group=null
        raise explain_choice(error, folder, overrides) from None
    return cfg


def groups(folder: Path) -> dict[str, list[str]]:
    """The groups of a folder of configurations, and the names of the files that each has."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if (group := file.parent.relative_to(folder).as_posix()) != ".":
            found.setdefault(group, []).append(file.stem)
    return found


def explain_choice(error: ValueError, folder: Path, overrides: Iterable[str]) -> UserError:
    """What to choose instead where Hydra says that a group's choice must be text."""
    there = groups(folder)
    for override in overrides:
        key, _, value = override.partition("=")
        if key in there and not value.startswith("[") and value not in there[key]:
            return UserError(
                f"{override}: {key} takes the name of a file in {folder.name}/{key} ({', '.join(there[key])}); a "
                f"single key of it is set with {key}.KEY=VALUE"
            )
    return UserError(str(error))


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


_NO_SUCH_KEY = re.compile(r"Could not override '([^']+)'")


def explain_override(
    error: BaseException,
    folder: Path,
    name: str,
    overrides: Sequence[str],
    check: Callable[[DictConfig], Any] | None,
) -> UserError | None:
    """What to do instead where Hydra advises to append a key; None where it is about something else.

    Args:
        check: raises what is wrong with a configuration.
    """
    if not (found := _NO_SUCH_KEY.search(str(error))):
        return None
    key = found[1]
    given = [override for override in overrides if override.partition("=")[0] == key]
    others = [override for override in overrides if override not in given]
    try:
        cfg = compose_config(folder, name, others)
    except MISTAKES as other:  # one thing after the other
        return explain_override(other, folder, name, others, check)
    check_packages(cfg.hydra)
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    parent = key.rpartition(".")[0]
    if nearest_key(key, [*all_keys(raw), *(choices := groups(folder))]) in choices:
        return UserError(unknown_key(key, choices))
    if OmegaConf.is_config(OmegaConf.select(cfg, parent) if parent else cfg) and check is not None:
        try:
            check(_without_hydra(compose_config(folder, name, [*others, *(f"+{override}" for override in given)])))
        except UserError as wrong:
            return wrong
        except MISTAKES:
            pass
        else:
            return UserError(f"{key} is in no file of this configuration, but is read: write +{given[0]}")
    while parent and not OmegaConf.is_config(OmegaConf.select(cfg, parent)):
        parent = parent.rpartition(".")[0]
    below = [one for one in all_keys(raw) if not parent or one.startswith(f"{parent}.")]
    beside = [one for one in below if one.count(".") == parent.count(".") + bool(parent)]
    return UserError(unknown_key(key, beside, below))


def _without_hydra(cfg: DictConfig) -> DictConfig:
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _refuse_options(arguments: Sequence[str]) -> None:
    """Raises: UserError: an option that is none, or one amid the overrides; argparse would print its usage."""
    if unknown := get_args_parser().parse_known_args(arguments)[1]:
        if not unknown[0].startswith("-"):  # argparse takes those in one row only
            raise UserError(f"{unknown[0]} stands behind an option: write options such as -m before all KEY=VALUE")
        key, _, value = unknown[0].lstrip("-").partition("=")
        following = unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else "VALUE"
        raise UserError(f"{unknown[0]} is no option: write {key}={value or following}, without dashes")


def register_resolvers() -> None:
    """What the configurations in conf/ compute with, besides Hydra's and OmegaConf's own."""
    OmegaConf.register_new_resolver("validation_interval", _validation_interval, replace=True)
    OmegaConf.register_new_resolver("micro_batches", _micro_batches, replace=True)
    OmegaConf.register_new_resolver("mixed_precision", _mixed_precision, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True, use_cache=True)


def note_failure(error: BaseException) -> None:
    """Make the file that `SPHINX_STEP_FAILED` names, unless this is no failure but a signal or a regular end.

    Of a task that fails srun says SIGTERM, if it has ended the other tasks by that (`--kill-on-bad-exit`).
    """
    code = error.code if isinstance(error, SystemExit) else 1
    fails = not isinstance(error, KeyboardInterrupt) and (0 < code < 128 if isinstance(code, int) else code is not None)
    if (file := os.environ.get(FAILED)) and fails:
        with contextlib.suppress(OSError):
            Path(file).touch()


def entry_point(
    config_name: str,
    check: Callable[[DictConfig], Any] | None = None,
    arguments: Callable[[Sequence[str]], Sequence[str]] = list,
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """`hydra.main` on `conf/<config_name>.yaml`. Errors that a user can cause end in one line and exit code 2.

    With the environment variable SPHINX_TRACEBACK=1 they end in a traceback.

    Args:
        check: raises a `UserError` for a configuration that the script does not take.
        arguments: changes the command line before Hydra reads it.
    """
    register_resolvers()

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        begun = False

        @functools.wraps(main)
        def guarded(cfg: DictConfig) -> Any:
            nonlocal begun
            begun = True
            # Caught before Hydra adds lines of its own.
            try:
                check_packages(HydraConfig.get())
                if check is not None:
                    check(cfg)
                return main(cfg)
            except MISTAKES as error:
                if os.environ.get(TRACEBACK) == "1":
                    raise
                sys.exit(report(error))

        run = hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=config_name)(guarded)

        @functools.wraps(main)
        def wrapped() -> Any:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing and exiting
            gc.freeze()  # what was imported stays: no collection needs to look through it
            try:
                sys.argv[1:] = as_typed(config_name, arguments(sys.argv[1:]))
                _refuse_options(sys.argv[1:])
                if not first_process():  # the run folder is the first one's
                    sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=other_ranks"]
                return run()
            except BaseException as error:
                note_failure(error)
                parsed = get_args_parser().parse_known_args(sys.argv[1:])[0]
                given = list(parsed.overrides)
                if parsed.config_dir:  # what explains a mistake composes without the command line's options
                    given.append(f"hydra.searchpath=[file://{Path(parsed.config_dir).absolute()}]")
                if isinstance(error, HydraException) and os.environ.get(TRACEBACK) != "1":
                    try:
                        error = explain_override(error, CONFIG_FOLDER, config_name, given, check) or error
                    except UserError as other:
                        error = other
                if isinstance(error, OSError) and not isinstance(error, MISTAKES) and not begun:  # Hydra makes a folder
                    error = UserError(
                        f"the folder '{error.filename}' cannot be made ({error.strerror}): choose another one with "
                        f"{'output_dir' if config_name == 'train' else 'hydra.run.dir'}=FOLDER"
                    )
                if isinstance(error, KeyboardInterrupt) and os.environ.get(TRACEBACK) != "1":
                    print("interrupted", file=sys.stderr)
                    sys.exit(INTERRUPTED)
                # Hydra's only ValueError on the way to main() is for group=null; main's own errors are not mistakes.
                if isinstance(error, ValueError) and "Config group override" in str(error):
                    error = explain_choice(error, CONFIG_FOLDER, given)
                if os.environ.get(TRACEBACK) != "1" and isinstance(error, MISTAKES):
                    sys.exit(report(error))
                raise

        return wrapped

    return decorate
