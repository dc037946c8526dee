"""README and docs: every command is run, links lead somewhere, and lines of prose are short.

`test_a_command_of_the_docs_is_accepted` composes or parses each command. One of these runs it: `make demo`, whose steps
tests/pipeline/test_recipe.py compares with the quickstart; the long test here, in the order of the pages; a test that
`ELSEWHERE` names. Only commands that `NEEDS` names need what is not here, and are composed and no more.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sphinx_pl.cli.chat import ChatConfig
from sphinx_pl.runtime.command_line import as_typed, take_rest
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER, INSTALLED
from sphinx_pl.runtime.resolvers import register_resolvers
from tests.cli.test_train import SMALL
from tests.conftest import REPOSITORY, tracked
from tests.scripts import run_script

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
SCRIPTS = tuple(INSTALLED)
TOOLS = ("sphinx-data", "sphinx-checkpoint", "sphinx-pipeline")
STARTS = ("python", "torchrun", "srun", "accelerate", "make", "source", "pip", "convert", "lmms-eval", *TOOLS)
"""The first words of lines that are commands."""
STANDS_FOR = {"…": "", "$1": "vqav2", "$2": "x", "$3": "val", "$ROOT": "/data", "data/mixture=leaned": ""}
"""What a reader replaces or an earlier command makes, and something that it can be."""

NEEDS = {
    "*hydra/launcher=slurm*": "SLURM",
    "*launcher=slurm*": "SLURM",
    "srun *": "SLURM",
    "*trainer=zero3*": "GPUs",
    "*experiment=paper*": "the paper's data",
    "*outputs/paper/*": "the paper's data",
    "convert *": "official files",
    "*benchmarks=*": "official files",
    "*SPHINX-v2-1k*": "released weights",
    "*accelerate launch*": "GPUs",
    "torchrun *": "GPUs",
    "pip install*": "a package index",
    "*=leaned*": "a mixture that an earlier command leans",
    "* duplicates path=*": "shards with hashes",
    "*evaluation.compare *": "two evaluations",
    "*evaluation.report.page *": "two evaluations",
    "*then=mixture*": "a model that has learned something",
    "*experiment=real *": "published packages",
    "*source=hf-hub*": "the Hugging Face Hub",
    "*google/siglip2*": "the Hugging Face Hub",
}
"""Patterns of commands that this test cannot run, and what they need."""
REAL = "tests/pipeline/test_real.py::test_the_quick_recipe_of_real_pictures_ends_with_its_pages"
WHOLE = "tests/pipeline/test_whole.py::test_a_recipe_killed_in_its_finetune_resumes_from_the_checkpoint"
ELSEWHERE = {
    "python chat.py * ui=web": "tests/apps/test_web.py::test_a_browser_uploads_asks_and_sees_boxes",
    "lmms-eval *": "tests/test_packaging.py::test_it_works_beside_evaluate_and_lmms_eval",
    "sphinx-checkpoint import DELTA *": "tests/checkpoints/test_original.py::test_differences_are_added_to_their_base",
    "sphinx-checkpoint export * --to original *": (
        "tests/checkpoints/test_original.py::test_to_our_format_and_back_is_bit_for_bit"
    ),
    "*experiment=own*": "tests/test_own_data.py::test_the_pages_commands_train_a_model_that_answers",
    "*outputs/own/*": "tests/test_own_data.py::test_the_pages_commands_train_a_model_that_answers",
    "sphinx-pipeline experiment=demo": (
        "tests/pipeline/test_whole.py::test_a_recipe_killed_in_its_finetune_resumes_from_the_checkpoint"
    ),
    "sphinx-pipeline status *": (
        "tests/pipeline/test_whole.py::test_a_recipe_killed_in_its_finetune_resumes_from_the_checkpoint"
    ),
    "sphinx-pipeline experiment=real_quick": REAL,
    "sphinx-data real *": REAL,
    "*plan=true*": "tests/planning/test_plan.py::test_13b_on_512_gpus_from_the_command_line",
}
"""Patterns of commands, and the test that runs them."""
MAKE = {"make demo": "demo", "make real": "real", "make venv": "", "make test": "", "source .venv/bin/activate": ""}
"""What make runs, and what every user types: the recipe of it, if it is one."""


def fenced(page: Path) -> Iterator[str]:
    """Lines of the fenced blocks, continued ones joined."""
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\\\n\s*", "", block).splitlines()


def plain(line: str) -> str:
    """The command of a line, without its comment."""
    return " ".join(re.sub(r"\s#.*", "", line).split())


def lines() -> list[str]:
    """The commands of all pages, each once, in their order; those of the quickstart first."""
    pages = sorted(PAGES, key=lambda page: page.name != "quickstart.md")
    texts = [plain(line) for page in pages for line in fenced(page)]
    return list(dict.fromkeys(text for text in texts if text.partition(" ")[0] in STARTS and " " in text))


def needs(line: str) -> str | None:
    """What a command needs that is not here."""
    return next((need for pattern, need in NEEDS.items() if fnmatchcase(line, pattern)), None)


def elsewhere(line: str) -> str | None:
    """The test that runs a command."""
    return next((test for pattern, test in ELSEWHERE.items() if fnmatchcase(line, pattern)), None)


def commands() -> list[tuple[str, ...]]:
    """Script, tool or module, then its arguments, as a shell would give them."""
    modules = r"-m (?:sphinx_pl|benchmarks|perf)[\w.]*"
    begin = re.compile(rf"(?:\b(?:{'|'.join(SCRIPTS)})\.py|\b(?:{'|'.join(TOOLS)})|{modules})(?= |$)")
    values = {}
    for line in (line for page in PAGES for line in fenced(page)):
        if (start := begin.search(line)) is None or not set(line.split()) & set(STARTS) | {"convert()"}:
            continue
        text = line[start.start() :].partition(";")[0]
        for placeholder, value in STANDS_FOR.items():
            text = text.replace(placeholder, value)
        if words := [word for word in shlex.split(text, comments=True) if word != "-m"]:
            values[tuple(words)] = None
    return [command for command in values if len(command) > 1 and command[1:2] != ("mix_weights.py",)]


# --- every command is accepted


def one_point(overrides: list[str]) -> list[str]:
    """The overrides of a sweep's first point."""
    points = []
    for override in OverridesParser.create().parse_overrides(overrides):
        line = override.input_line
        if override.is_sweep_override():
            line = f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        points.append(line)
    return points


def composed(name: str, overrides: list[str]) -> DictConfig:
    """The configuration of a script's command line."""
    register_resolvers()
    if name == "chat":
        overrides = take_rest(overrides, "question", ChatConfig.__dataclass_fields__)
    overrides = [one for one in overrides if one not in ("--help", "--cfg", "job")]
    overrides = as_typed(name, overrides)
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return compose(name, overrides=one_point(overrides), return_hydra_config=True)


def check_script(name: str, overrides: list[str]) -> None:
    cfg = composed(name, overrides)
    if name == "train":
        sources = OmegaConf.to_container(cfg.data.val_sources, resolve=False)
        assert sources
    check_names(cfg)


def check_names(cfg: DictConfig) -> None:
    """What keys name by themselves, which only the script looks up."""
    for pattern in cfg.get("benchmarks") or ():
        assert any(fnmatchcase(names, pattern) for names in cfg.benchmark), f"no benchmark '{pattern}'"
    for source in cfg.get("curve_sources") or ():
        assert source in cfg.data.val_sources
    if image := cfg.get("image"):
        assert Path(image).is_file(), image


class AcceptedError(Exception):
    """The arguments are right; nothing is done with them."""


def check_module(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "sphinx_pl.cli.data" and arguments[0] == "real":
        check_module("sphinx_pl.cli.real", arguments[1:], monkeypatch)
    elif name == "sphinx_pl.cli.data":
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
        check_module(f"sphinx_pl.cli.{name.removeprefix('sphinx-')}" if name in TOOLS else name, arguments, monkeypatch)


def test_every_page_with_commands_is_read() -> None:
    named = {command[0] for command in commands()}
    assert {*(f"{name}.py" for name in SCRIPTS), *TOOLS} <= named
    assert len(commands()) > 40


# --- every command is run


def test_make_demo_runs_the_recipe() -> None:
    for target in ("demo", "sample-full", "real"):
        output = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert f"-m sphinx_pl.cli.pipeline experiment={target.replace('-', '_')}" in output.stdout


def _of_quickstart() -> list[str]:
    """The commands of the quickstart's section about the demo; tests/pipeline/test_recipe.py compares them with it."""
    section = (REPOSITORY / "docs" / "quickstart.md").read_text().split("\n## ")[2]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    texts = [plain(line) for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [text for text in texts if text.startswith("python ") and "-m" not in text]


DEMO = _of_quickstart()
HERE = [line for line in lines() if line not in MAKE and not needs(line) and not elsewhere(line)]
"""The commands that the long test runs."""


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_a_test_that_is_named_exists(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"def {name}" in (REPOSITORY / file).read_text()


@pytest.mark.parametrize("pattern", sorted({**NEEDS, **ELSEWHERE}))
def test_an_exception_is_of_a_command_that_is_there(pattern: str) -> None:
    assert any(fnmatchcase(line, pattern) for line in lines())


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, sample_data: Path) -> Path:
    """A clone with a small sample world, in which the commands are run one after the other."""
    folder = tmp_path_factory.mktemp("reader")
    for path in REPOSITORY.iterdir():
        if path.name not in ("outputs", "data") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / "data").mkdir()
    shutil.copytree(sample_data, folder / "data" / "sample")
    return folder


def shortened(words: Sequence[str]) -> list[str]:
    """What is appended to a command so that it takes seconds; it changes sizes only."""
    if "--help" in words or "--cfg" in words:
        return []
    match Path(words[0]).name:
        case "train.py":
            return [*SMALL, "stage.max_steps=2", "data.val_samples=4", "trainer.max_steps=2"]
        case "mix_weights.py":
            return ["data.packing.micro_batch_rows=2", "data.val_samples=2", "device=cpu"]
        case "evaluate.py":
            return ["limit=1", "shuffled=false", "constant=20", "device=cpu"]
        case "chat.py":
            return ["device=cpu", "generation.max_new_tokens=4"]
        case "sample.py":
            return ["--scale", "0.02"]
    return []


def argv(line: str) -> list[str]:
    """A command as `run_script` takes it: the file that runs, then its arguments."""
    words = shlex.split(line)
    if words[0] in TOOLS:
        file = REPOSITORY / "sphinx_pl" / "cli" / f"{words[0].removeprefix('sphinx-')}.py"
        return [str(file), *words[1:]]
    if words[1] == "-m":
        return [str(REPOSITORY / f"{words[2].replace('.', '/')}.py"), *words[3:]]
    return words[1:]


def make_what_pages_name(folder: Path) -> None:
    """The files that stand for what a reader has: names in capitals, and two models for any mixture."""
    from sphinx_pl.cli.checkpoint import main as checkpoint

    models = {"REAL": "pretrain_real", "SYNTHETIC": "pretrain_synthetic", "MODEL": "finetune", "FOLDER": "finetune"}
    for name, run in (models | {"CHECKPOINT": "finetune"}).items():
        (folder / name).symlink_to(folder / "outputs" / "demo" / run / "model")
    for name, model in (("A", "REAL"), ("B", "SYNTHETIC")):
        assert checkpoint(["export", str(folder / model), str(folder / name), "--to", "huggingface"]) == 0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_commands_run(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    torch.set_num_threads(1)
    failures = []
    assert set(DEMO) <= set(HERE)
    for line in sorted(HERE, key=lambda line: line not in DEMO):
        if line not in DEMO and not (clone / "MODEL").exists():
            make_what_pages_name(clone)
        words = argv(line)
        options = shortened(words)
        split = words.index("--") if "--" in words else len(words)
        if words[0] == "chat.py":  # the question comes last
            split = next((n for n, word in enumerate(words) if n and "=" not in word), len(words))
        done = run_script([*words[:split], *options, *words[split:]], cwd=clone, timeout=900)
        if done.returncode:
            failures.append(f"{line}\n    {done.stderr.strip().splitlines()[-1:]}")
        for out in ("OUT", "D"):  # several commands of a page write to one name
            shutil.rmtree(clone / out, ignore_errors=True)
    assert not failures, "\n".join(failures)


# --- pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_pages_that_are_linked_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if "://" in target:
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    text = re.sub(r"^ *```\w*\n.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


WIDTH = 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_prose_are_short(page: Path) -> None:
    """Tables, code and lines of one word that cannot be broken, such as a link, are excepted."""
    text = re.sub(r"^ *```\w*\n.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    long = [
        line
        for line in text.splitlines()
        if len(line) > WIDTH and not line.lstrip().startswith("|") and len(line.lstrip("- ").split()) > 1
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """Names of Python files in the text, with their folder or without, but those that the page adds."""
    text = re.sub(r"^ *```python\n.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    names = set(re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.py)\b", text))
    files = [f"/{name}" for name in tracked()]
    assert not [name for name in names if not any(file.endswith(f"/{name}") for file in files)]


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120
