"""The commands and files that README and docs name exist: configurations compose, and parsers
accept the rest.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import sphinx_pl.runtime.hydra_app
from sphinx_pl.cli.chat import ChatConfig
from sphinx_pl.runtime.command_line import as_typed, take_rest
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER
from tests.conftest import REPOSITORY

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
SCRIPTS = ("train", "evaluate", "mix_weights", "chat")
BEGIN = re.compile(rf"(?:\b(?:{'|'.join(SCRIPTS)})\.py|-m (?:sphinx_pl|perf)[\w.]*)(?= |$)")
STANDS_FOR = {"…": "", "$1": "vqav2", "$2": "x", "$3": "val", "$ROOT": "/data", "data/mixture=leaned": ""}
"""What a reader replaces or an earlier command makes, and something that it can be."""


def fenced(page: Path) -> Iterator[str]:
    """Lines of the fenced blocks, continued ones joined."""
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\\\n\s*", "", block).splitlines()


def commands() -> list[tuple[str, ...]]:
    """Script or module, then its arguments, as a shell would give them."""
    found = {}
    for line in (line for page in PAGES for line in fenced(page)):
        begin = BEGIN.search(line)
        if begin is None:
            continue
        text = line[begin.start() :].partition(";")[0]
        for placeholder, value in STANDS_FOR.items():
            text = text.replace(placeholder, value)
        words = [word for word in shlex.split(text, comments=True) if word != "-m"]
        found[tuple(words)] = None
    return list(found)


def one_point(overrides: list[str]) -> list[str]:
    """The overrides of a sweep's first point."""
    points = []
    for override in OverridesParser.create().parse_overrides(overrides):
        line = override.input_line
        if override.is_sweep_override():
            line = f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        points.append(line)
    return points


def check_script(name: str, overrides: list[str]) -> None:
    sphinx_pl.runtime.hydra_app.register_resolvers()
    if name == "chat":
        overrides = take_rest(overrides, "question", ChatConfig.__dataclass_fields__)
    overrides = as_typed(name, overrides)
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = compose(name, overrides=one_point(overrides), return_hydra_config=True)
    if name == "train":
        sources = OmegaConf.to_container(cfg.data.val_sources, resolve=False)
        assert sources
    check_names(cfg)


def check_names(cfg: DictConfig) -> None:
    """What keys name by themselves, which only the script looks up."""
    for pattern in cfg.get("benchmarks") or ():
        assert any(fnmatchcase(known, pattern) for known in cfg.benchmark), f"no benchmark '{pattern}'"
    for source in cfg.get("curve_sources") or ():
        assert source in cfg.data.val_sources
    if image := cfg.get("image"):
        assert Path(image).is_file(), image


class AcceptedError(Exception):
    """The arguments are right; nothing is done with them."""


def check_module(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "sphinx_pl.cli.data":
        from sphinx_pl.cli.data import COMMANDS, composed, split
        from sphinx_pl.utils.config import build

        command = COMMANDS[arguments[0]]
        values, overrides = split(arguments[1:], command.options)
        build(command.options, values, "")
        composed(overrides)
    elif name == "sphinx_pl.cli.pipeline":
        from sphinx_pl.pipeline.recipe import load

        load([argument for argument in arguments if argument not in ("run", "status", "cancel")])
    else:
        parse = argparse.ArgumentParser.parse_args

        def only_parse(parser: argparse.ArgumentParser, *given: object) -> None:
            parse(parser, *given)  # type: ignore[call-overload]
            raise AcceptedError

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        package = (REPOSITORY / name.replace(".", "/")).is_dir()
        module = importlib.import_module(f"{name}.__main__" if package else name)
        with pytest.raises(AcceptedError):
            module.main(arguments)


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the files that docs/own_data.md describes."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("docs", "conf", "tests"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "photos").mkdir()
    for name in ("photos.csv", "chats.json", "photos/000.png"):
        (folder / name).touch()
    (folder / "photos.csv").write_text("image,caption\nphotos/000.png,a red circle\n")
    (folder / "chats.json").write_text('[{"conversations": []}]')
    return folder


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_of_the_docs_is_accepted(
    command: tuple[str, ...], users_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(users_folder)
    name, *arguments = command
    if name.endswith(".py"):
        check_script(name.removesuffix(".py"), arguments)
    else:
        check_module(name, arguments, monkeypatch)


def test_every_page_with_commands_is_read() -> None:
    named = {command[0] for command in commands()}
    assert {
        *(f"{name}.py" for name in SCRIPTS),
        "sphinx_pl.cli.data",
        "sphinx_pl.cli.pipeline",
        "sphinx_pl.cli.checkpoint",
    } <= named
    assert len(commands()) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_pages_that_are_linked_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
