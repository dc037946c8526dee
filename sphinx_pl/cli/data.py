"""`sphinx-data COMMAND [option=value ...] [override ...]`: look at data before
training on it.

Arguments that are not options of the command override conf/train.yaml. So a command sees the data
that train.py would train on with the same overrides.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.progress import Progress

from sphinx_pl.runtime.command_line import as_typed
from sphinx_pl.runtime.hydra_app import TRACEBACK, report
from sphinx_pl.runtime.overrides import MISTAKES, check_packages, compose_config, explain_override
from sphinx_pl.settings.train import check_train
from sphinx_pl.utils.config import CONFIG_FOLDER, build
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.registry import Registry

Options = TypeVar("Options")


@dataclass(frozen=True)
class Command(Generic[Options]):
    """A command. `run` gets the options and the composed configuration; its result is printed."""

    help: str
    options: type[Options]
    run: Callable[[Options, DictConfig], str]


COMMANDS: Registry[Command[Any]] = Registry("command")
REAL = "real"
"""The command that makes data instead of looking at them. It has options of its own."""


@dataclass
class ShowOptions:
    """The number of samples, and the file to write."""

    n: int = 64
    out: str = "page.html"

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 1000:
            raise UserError(f"n={self.n} must be 1 to 1000")
        if Path(self.out).is_dir():
            raise UserError(
                f"out={self.out} is a folder: give a file in it, such as out={Path(self.out) / 'page.html'}"
            )
        if not Path(self.out).parent.is_dir():
            raise UserError(f"out={self.out}: there is no folder {Path(self.out).parent}: make it first")


def show(options: ShowOptions, cfg: DictConfig) -> str:
    """Write a page with samples; see `sphinx_pl.data.inspect.samples`."""
    from sphinx_pl.data.datamodule import DataModule
    from sphinx_pl.data.inspect.samples import build_page
    from sphinx_pl.models.config import SphinxConfig
    from sphinx_pl.utils.files import write_whole

    model = SphinxConfig.from_dict(cfg.model)
    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    data = DataModule.from_config(values, model)
    data.check(accumulate=int(cfg.stage.accumulate))
    notices = []
    try:
        data.check(cfg.stage.text_required, int(cfg.stage.accumulate))
    except UserError as error:  # the data can still be shown
        notices.append(f"train.py would refuse this: {error}")
    what = f"stage {cfg.stage.name}, model {model.name}"
    grid = model.vision.grid if model.vision else 1
    page, count = build_page(data, options.n, int(cfg.stage.accumulate), grid, what, notices)
    try:
        write_whole(Path(options.out), page)
    except OSError as error:
        raise UserError(f"out={options.out} cannot be written ({error.strerror})") from None
    return f"{options.out}: {count} samples, {len(page) / 1e6:.1f} MB"


@dataclass
class TableOptions:
    """The draws from each source for the expectations, the ranks of the run, and whether files may
    be missing."""

    probe: int = 64
    ranks: int = 1
    missing: str = "error"

    def __post_init__(self) -> None:
        if self.missing not in ("error", "ok"):
            raise UserError(f"missing={self.missing} must be error or ok")
        if self.probe < 1 or self.ranks < 1:
            raise UserError(f"probe={self.probe} and ranks={self.ranks} must be at least 1")


def table(options: TableOptions, cfg: DictConfig) -> str:
    """Return the table of the mixture.

    With missing files it shows only what the configuration tells.
    """
    from sphinx_pl.data.datamodule import DataModule
    from sphinx_pl.data.inspect.table import expectations, lines, missing, plan, reasons
    from sphinx_pl.data.sampling.config import Group, SourceConfig, is_absent
    from sphinx_pl.models.config import SphinxConfig

    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    group = Group.from_dict(
        {"sources": values["sources"], "temperature": (values.get("mixing") or {}).get("temperature")}
    )
    model = SphinxConfig.from_dict(cfg.model)
    micro_batches = int(cfg.stage.accumulate) * (options.ranks if cfg.stage.global_batch_rows is None else 1)
    rows = values["packing"]["micro_batch_rows"] * micro_batches
    absent = missing(dict(group.leaves()))
    held_out = {name: value for name, value in (values.get("val_sources") or {}).items() if not is_absent(value)}
    configs = {name: SourceConfig.from_dict(name, value, "val_sources") for name, value in held_out.items()}
    absent |= {f"val_sources.{name}": why for name, why in missing(configs).items()}
    if not Path(str(values["tokenizer"])).exists():
        absent["tokenizer"] = f"there is no tokenizer {values['tokenizer']}"
    if absent:
        text = rendered(plan(group, absent))
        if options.missing == "ok":
            return text
        print(text)
        first = next(iter(absent.values()))
        raise UserError(f"files are missing for {', '.join(absent)} ({first}); missing=ok shows only the plan")
    data = DataModule.from_config(values, model)
    data.check(accumulate=micro_batches)
    rows_of_sources = lines(data, options.probe)
    table = expectations(rows_of_sources, data.mixing.unit, data.packing.row_length, rows, int(cfg.stage.max_steps))
    return rendered(table) + reasons(rows_of_sources)


def rendered(table: Table) -> str:
    """Return the table as text, as wide as it needs if there is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


@dataclass
class DuplicatesOptions:
    """The shards, as a source's `path` names them; what to compare (image, caption or a column of
    the json); the result."""

    path: str = ""
    by: str = "image"
    out: str = "duplicates.npy"

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("path=SHARDS is needed: give the path of the source that the result is for")


def duplicates(options: DuplicatesOptions, cfg: DictConfig) -> str:
    """Find image-text pairs that repeat an earlier one, for a source's `filters.duplicates`."""
    from sphinx_pl.data.inspect.duplicates import find_duplicates

    with Progress(*Progress.get_default_columns(), transient=True) as bar:
        task = bar.add_task("shards")
        pairs, unreadable, repeated = find_duplicates(
            options.path,
            options.by,
            Path(options.out),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    return (
        f"{options.out}: {repeated} of {pairs} pairs are duplicates by {options.by}, {unreadable} could not be compared"
    )


COMMANDS.register("show", Command("a page with samples as the model gets them", ShowOptions, show))
COMMANDS.register("table", Command("the mixture: sizes, shares and expectations of an epoch", TableOptions, table))
COMMANDS.register(
    "duplicates", Command("image-text pairs that repeat others, to be filtered", DuplicatesOptions, duplicates)
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return exit code 0, or 2 after a line that names the mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == REAL:
        from sphinx_pl.cli.real import main as make_real

        return make_real(words[1:])
    try:
        command = COMMANDS[words[0]]
        values, overrides = split(words[1:], command.options)
        options = build(command.options, values, "")
        print(command.run(options, composed(overrides)))
    except MISTAKES as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        return report(error)
    return 0


def split(arguments: Sequence[str], options: type[Any]) -> tuple[dict[str, str], list[str]]:
    """Split arguments into values of a command's own options and overrides of the configuration."""
    names = {field.name for field in dataclasses.fields(options)}
    values: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals and not argument.startswith("~"):
            raise UserError(f"'{argument}' is neither name=value nor ~name")
        if equals and name in names:
            values[name] = value
        else:
            overrides.append(argument)
    return values, overrides


def composed(overrides: Sequence[str]) -> DictConfig:
    """Return conf/train.yaml as train.py gets it.

    Raises:
        UserError, HydraException: an override or a key is wrong.
    """
    arguments = as_typed("train", overrides)
    try:
        cfg = compose_config(CONFIG_FOLDER, "train", arguments)
    except HydraException as error:
        raise explain_override(error, CONFIG_FOLDER, "train", arguments, check_train) or error from None
    check_packages(cfg.hydra)
    with open_dict(cfg):
        del cfg["hydra"]
    check_train(cfg)
    return cfg


def _usage() -> str:
    lines = [__doc__ or ""]
    for name, command in sorted(COMMANDS.items()):
        own = " ".join(f"{field.name}={field.default}" for field in dataclasses.fields(command.options))
        lines += [f"    {name:12s}{command.help} ({own})"]
    lines += [f"    {REAL:12s}data of real pictures and text from published packages (--help)"]
    return "\n".join([*lines, "", "    sphinx-data show experiment=demo stage=finetune n=64 out=page.html"])


if __name__ == "__main__":
    sys.exit(main())
