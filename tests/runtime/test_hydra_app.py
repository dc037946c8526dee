"""A mistake ends in one line on stderr and exit code 2. Any other error ends in a traceback."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import OverrideParseException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sphinx_pl.cli.chat import ChatConfig
from sphinx_pl.runtime.command_line import as_typed, take_rest
from sphinx_pl.runtime.hydra_app import FAILED, TRACEBACK, entry_point, note_failure
from sphinx_pl.runtime.overrides import compose_config, one_line
from sphinx_pl.runtime.resolvers import register_resolvers
from sphinx_pl.utils.config import CONFIG_FOLDER, escaped, pick
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY

Run = Callable[..., str]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def arguments(*overrides: str) -> None:
        GlobalHydra.instance().clear()
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(sys, "argv", ["script.py", f"hydra.run.dir={tmp_path}", *overrides])

    monkeypatch.delenv(TRACEBACK, raising=False)
    # the entry point sets it; it is restored after the test
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    return arguments


@pytest.fixture
def failure(arguments: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Run:
    """The line that a main ends with."""

    def failure(main: Callable[[], Any], *overrides: str) -> str:
        arguments(*overrides)
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        [line] = err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return failure


def main_that(does: Callable[[DictConfig], Any]) -> Callable[[], Any]:
    return entry_point("mix_weights")(does)


def test_what_main_gets_is_the_composed_configuration(arguments: Callable[..., None]) -> None:
    configs: list[DictConfig] = []
    arguments("beta=0.25", "out=mixed")
    main_that(configs.append)()
    [cfg] = configs
    assert (cfg.beta, cfg.out, cfg.method) == (0.25, "mixed", "linear")


def test_a_mistake_is_one_line(failure: Run) -> None:
    def main(cfg: DictConfig) -> None:
        raise UserError("data.root: no folder\n  at 'x': make it")

    assert failure(main_that(main)) == "data.root: no folder at 'x': make it"


def test_a_mistake_in_what_is_instantiated_is_told_without_hydras_wrapping(failure: Run) -> None:
    def main(cfg: DictConfig) -> None:
        instantiate({"_target_": "sphinx_pl.callbacks.export.ExportModel", "folder": "x", "dtype": "float8"})

    assert failure(main_that(main)) == ("callbacks.export.dtype='float8' must be one of float32, bfloat16, float16")


def test_an_argument_that_does_not_exist_is_named(failure: Run) -> None:
    def main(cfg: DictConfig) -> None:
        instantiate({"_target_": "sphinx_pl.callbacks.export.ExportModel", "folder": "x", "dtpe": "float32"})

    line = failure(main_that(main))
    assert "sphinx_pl.callbacks.export.ExportModel" in line
    assert "dtpe" in line


def test_a_key_that_does_not_exist_is_named(failure: Run) -> None:
    line = failure(main_that(lambda cfg: OmegaConf.to_container(cfg.data.nothing)))
    assert "data.nothing" in line
    assert "object_type" not in line


@pytest.mark.parametrize("script", ["train", "mix_weights", "evaluate"])
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("methd=linear", "methd"),
        ("data=sampel", "sampel"),
        ("data.packing.row_lenght=5", "row_lenght"),
        ("seed=[1", "'[1'"),
    ],
)
def test_wrong_overrides_are_answered_by_every_script(failure: Run, script: str, override: str, named: str) -> None:
    assert named in failure(importlib.import_module(f"sphinx_pl.cli.{script}").main, override)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        (
            "stage=fintune",
            "stage=fintune: there is no file stage/fintune.yaml; did you mean 'finetune'? known: finetune,",
        ),
        ("callbacks=[defalt]", "callbacks=defalt: there is no file callbacks/defalt.yaml; did you mean 'default'?"),
        ("model=null", "model=null: model takes the name of a file in conf/model ("),
        ("seed=1,2", "seed=1,2: for a list write seed=[1,2], for a run with each value add -m"),
        ("stage", "'stage' is not an override: write key=value, without spaces around ="),
        ("--seed=3", "--seed=3 is not an option: write seed=3, without dashes"),
        ("--seed", "--seed is not an option: write seed=VALUE, without dashes"),
        ("name=me (1)", "name=me (1): Hydra cannot read this value; as text it is"),
    ],
)
def test_what_hydra_cannot_read_is_answered_with_what_to_write(failure: Run, override: str, answer: str) -> None:
    assert failure(importlib.import_module("sphinx_pl.cli.train").main, override).startswith(answer)


def test_what_is_advised_for_a_text_is_that_text() -> None:
    with pytest.raises(OverrideParseException) as error_info:
        compose_config(CONFIG_FOLDER, "train", [f"name={(text := 'it`s (1) #2')}"])
    advice = one_line(error_info.value).partition("as text it is ")[2]
    assert compose_config(CONFIG_FOLDER, "train", shlex.split(advice)).name == text


@pytest.mark.parametrize(("script", "key"), [("train", "output_dir"), ("evaluate", "hydra.run.dir")])
def test_a_folder_that_cannot_be_made_is_one_line(failure: Run, script: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = failure(importlib.import_module(f"sphinx_pl.cli.{script}").main, f"hydra.run.dir={tmp_path}/file/run")
    assert (
        message
        == f"the folder '{tmp_path}/file/run' cannot be made (Not a directory): choose another one with {key}=FOLDER"
    )


def test_with_the_variable_a_mistake_has_a_traceback(
    arguments: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(cfg: DictConfig) -> None:
        raise UserError("no")

    monkeypatch.setenv(TRACEBACK, "1")
    arguments()
    with pytest.raises(UserError, match="no"):
        main_that(main)()


def test_ctrl_c_is_one_word_and_the_exit_code_of_a_shell(
    arguments: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    arguments()
    with pytest.raises(SystemExit) as exit_info:
        main_that(main)()
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_error_of_the_program_is_not_hidden(arguments: Callable[..., None]) -> None:
    arguments()
    with pytest.raises(ZeroDivisionError):
        main_that(lambda cfg: 1 / 0)()


def composed(*overrides: str) -> Any:
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def test_micro_batches_follow_from_the_rows_of_a_step_and_the_ranks() -> None:
    assert composed().stage.accumulate == 1
    rows = ["stage.global_batch_rows=48", "data.packing.micro_batch_rows=2"]
    assert composed(*rows).stage.accumulate == 24
    assert composed(*rows, "trainer.devices=4", "trainer.num_nodes=3").stage.accumulate == 2
    assert composed(*rows, "trainer.devices=[0,2]").stage.accumulate == 12
    assert composed(*rows, "stage.accumulate=5").stage.accumulate == 5
    with pytest.raises(
        Exception, match=r"global_batch_rows=48 is not a multiple of data\.packing\.micro_batch_rows=2 \* 5 \* 1"
    ):
        composed(*rows, "trainer.devices=5").stage.accumulate  # noqa: B018


def test_a_cpu_computes_in_bf16_where_it_has_the_instructions() -> None:
    # PyTorch's own test
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert composed("trainer=cpu").trainer.precision == ("bf16-mixed" if native else "32-true")
    assert composed("trainer=ddp").trainer.precision == composed("trainer=gpu").trainer.precision == "bf16-mixed"
    assert composed("trainer=cpu", "trainer.precision=bf16-mixed").trainer.precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("error", "fails"),
    [
        (UserError("wrong"), True),
        (ZeroDivisionError(), True),
        (SystemExit(2), True),
        (SystemExit("a sentence"), True),
        (SystemExit(0), False),
        (SystemExit(None), False),
        (SystemExit(128 + 12), False),  # saved at a signal
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_a_failure_is_told_from_a_signal(
    error: BaseException, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAILED, str(tmp_path / "failed"))
    note_failure(error)
    assert (tmp_path / "failed").exists() == fails


def test_a_script_that_fails_notes_it(failure: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILED, str(tmp_path / "failed"))

    def main(cfg: DictConfig) -> None:
        raise UserError("wrong")

    failure(main_that(main))
    assert (tmp_path / "failed").exists()


TYPED = [
    "Hello, how are you?",
    "What's in the image?",
    "She said \"no\"; 'yes' is better",
    "(a) or [b]: {c}? #1 = $2, ${seed} 100% ~ * & | \\ \\' \\",
    "图中有什么？ Où? 😀",
    "  spaces\tand\nlines  ",
    "true",
    "007",
    "1e3",
    "a=b,c=d",
    "???",
    "null",
]


@pytest.mark.parametrize("text", TYPED)
@pytest.mark.parametrize("key", ["question", "image"])
def test_what_people_type_is_taken_as_it_is(key: str, text: str) -> None:
    if key == "image" and "${" in text:
        text = text.replace("${", "$")  # in a path it is an interpolation
    if key == "image" and text == "null":
        text = "null.png"  # null alone is no path
    if text == "???":
        text += " "  # without it OmegaConf takes it for no value
    cfg = compose_config(CONFIG_FOLDER, "chat", as_typed("chat", [f"{key}={text.replace('??? ', '???')}"]))
    assert cfg[key] == text
    assert pick(ChatConfig, OmegaConf.create({"checkpoint": "x", key: escaped(text)})).__dict__[key] == text


def test_paths_may_be_interpolations_and_lists_stay_lists() -> None:
    overrides = ["checkpoints=[a,b]", "out=mixed, ${beta} (1)", "beta=0.5", "base=null", "curve_dir='a b'"]
    cfg = compose_config(CONFIG_FOLDER, "mix_weights", as_typed("mix_weights", [*overrides[:1], *overrides[2:]]))
    assert (list(cfg.checkpoints), cfg.base, cfg.curve_dir) == (["a", "b"], None, "a b")
    assert as_typed("mix_weights", ["out=mixed_${beta}"]) == ["out=mixed_${beta}"]
    assert as_typed("evaluate", sweep := ["-m", "checkpoint=a,b"]) == sweep


@pytest.mark.parametrize(
    ("words", "question"),
    [
        (["What's", "this?"], "What's this?"),
        (["Is 2+2=4, (really)?"], "Is 2+2=4, (really)?"),
        (["--", "image=x", "and", "-y"], "image=x and -y"),
        (["图中有什么=?"], "图中有什么=?"),
        (["-5 + 3 = ?"], "-5 + 3 = ?"),
        (["-", "what is it?"], "- what is it?"),
        (["~ 5 or more?"], "~ 5 or more?"),
        (["-m is what?"], "-m is what?"),
        (["Is:this=right?"], "Is:this=right?"),
        ([""], ""),
    ],
)
def test_the_rest_of_the_command_line_is_the_question(words: list[str], question: str) -> None:
    line = take_rest(["checkpoint=x", "generation.seed=1", *words], "question", ["checkpoint", "image"])
    assert line == ["checkpoint=x", "generation.seed=1", f"question={question}"]


def test_options_and_misspelt_keys_are_no_question() -> None:
    for line in (["--cfg", "job"], ["checkpoint=x", "imge=cat.jpg"], ["checkpoint=x"], ["+generation.x=1", "--help"]):
        assert take_rest(line, "question", ["image"]) == line
    with pytest.raises(UserError, match=r"image=cat\.jpg follows the question"):
        take_rest(["What", "is", "this?", "image=cat.jpg"], "question", ["image"])
    with pytest.raises(UserError, match="give only one of them"):
        take_rest(["question=a", "b?"], "question", ["image"])


@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question_is_refused(question: str) -> None:
    with pytest.raises(UserError, match="question= is empty"):
        pick(ChatConfig, OmegaConf.create({"checkpoint": "x", "question": question}))
    pick(ChatConfig, OmegaConf.create({"checkpoint": "x", "question": question, "ui": "web"}))


def test_what_a_library_refuses_is_one_line(failure: Run) -> None:
    def main(cfg: DictConfig) -> None:
        instantiate({"_target_": "lightning.Trainer", "devices": 1, "accelerator": "cpu", "precision": "bf17"})

    assert "bf17" in failure(main_that(main))


@pytest.mark.parametrize("question", [None, "What is this?", "x" * 5000])
def test_a_folder_instead_of_the_question_is_the_checkpoint(question: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Give checkpoint=FOLDER"):
        ChatConfig(question=question)
    with pytest.raises(UserError, match=f"Give checkpoint={tmp_path}$"):
        ChatConfig(question=str(tmp_path))


@pytest.mark.parametrize("override", ["output_dir=", "run=", "run='  '", "run=null", "output_dir=null"])
def test_a_run_folder_with_an_empty_part_is_refused(override: str) -> None:
    """A shell's variable that is not set would make the run a folder at the root of the disk."""
    cfg = compose_config(CONFIG_FOLDER, "train", [override])
    with pytest.raises(OmegaConfBaseException) as error_info:
        assert cfg.hydra.run.dir
    assert one_line(error_info.value) == f"{override.partition('=')[0]} is empty: give the name of a folder, or omit it"
