"""The steps, commands and refusals that conf/pipeline/ and a command line give.

No step runs here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sphinx_pl.cli.pipeline import main
from sphinx_pl.pipeline.recipe import load, split
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def commands(*arguments: str) -> dict[str, str]:
    return {name: " ".join(step.command[1:]) for name, step in load(arguments).steps.items()}


def without(*steps: str) -> list[str]:
    """Return arguments that omit these steps, each of which is composed in a fifth of a second."""
    return [f"steps.{name}=null" for name in steps]


def test_the_demo_is_what_the_quickstart_lists() -> None:
    steps = commands("experiment=demo")
    assert list(steps) == [
        *("data", "pretrain_real", "pretrain_synthetic", "mix", "finetune", "pretrain_synthetic_notext", "evaluate")
    ]
    page = (REPOSITORY / "docs" / "quickstart.md").read_text().replace(" \\\n    ", " ")
    listings = [line.partition("#")[0].split() for line in page.splitlines() if line.startswith("python ")]
    # The pipeline writes these although they are defaults: the recipe, its folders, and how a step
    # resumes.
    defaults = {"experiment=demo", "output_dir=outputs/demo", "data.root=data/sample", "--scale", "1"}
    defaults |= {"ckpt_path=last", "overwrite=true", "++data.sources.chat=null"}
    for name, command in steps.items():
        words = [word for word in command.split() if word not in defaults]
        lines = [[word.strip("'") for word in line[1:]] for line in listings]
        assert words in lines, f"{name}: {words}"


def test_sample_full_has_every_stage_without_text_and_asks_after_all() -> None:
    steps = load(["experiment=sample_full"]).steps
    without = {name for name in steps if name.endswith("_notext")}
    assert without == {f"{stage}_notext" for stage in ("pretrain_real", "pretrain_synthetic", "finetune")}
    assert list(steps)[-1] == "evaluate"
    assert set(steps["evaluate"].needs) == {"finetune", *without}
    assert all("trainer.max_steps=250" in steps[name].command for name in without)
    assert "limit=100" in steps["evaluate"].command


def test_the_papers_stages_find_each_other() -> None:
    steps = load(["experiment=paper"]).steps
    assert list(steps) == ["pretrain_real", "pretrain_synthetic", "mix", "finetune", "evaluate"]
    assert "init_from: outputs/paper/pretrain_real/model" in steps["pretrain_synthetic"].config
    assert "init_from: outputs/paper/mixed" in steps["finetune"].config
    assert steps["mix"].product == Path("outputs/paper/mixed/provenance.json")
    assert "vqav2-val.jsonl" in steps["evaluate"].config


def test_overrides_reach_the_steps_that_they_name_and_the_nearer_one_wins() -> None:
    steps = load(
        [
            "experiment=paper",
            "all:data.val_samples=7",
            "train:stage.clip=2",
            "finetune:stage.clip=3",
            "finetune:~callbacks.throughput",
        ]
    ).steps
    assert "clip: 2" in steps["pretrain_real"].config
    assert "clip: 3" in steps["finetune"].config
    assert "throughput" in steps["pretrain_real"].config
    assert "throughput" not in steps["finetune"].config
    assert all("data.val_samples=7" in step.command for step in steps.values())
    assert not any("clip" in word for word in steps["mix"].command)


def test_a_step_that_is_null_is_omitted() -> None:
    steps = load(["experiment=demo", "steps.data=null", "steps.pretrain_synthetic_notext=null"]).steps
    assert steps["pretrain_real"].needs == ()
    assert steps["evaluate"].needs == ("finetune",)


def test_another_value_is_another_step_but_not_how_it_is_started() -> None:
    others = without("data", "pretrain_real", "pretrain_synthetic", "mix", "pretrain_synthetic_notext", "evaluate")

    def identity(*overrides: str) -> str:
        arguments = ["experiment=demo", *others, *(f"finetune:{override}" for override in overrides)]
        return load(arguments).steps["finetune"].identity

    plain, lower = identity(), identity("stage.optim.lr=1e-9")
    assert plain == identity("overwrite=true") == identity("ckpt_path=x")
    assert plain != lower == identity("stage.optim.lr=1e-3", "stage.optim.lr=1e-9")


def test_nodes_tasks_and_gpus_are_the_trainers() -> None:
    steps = load(
        [
            "experiment=paper",
            "launcher=slurm",
            "train:trainer=gpu",
            "train:trainer.devices=8",
            "finetune:++trainer.num_nodes=2",
            "launcher.time=1-00:00:00",
            "finetune:launcher.time=8:00:00",
        ]
    ).steps
    sizes = {name: (step.nodes, step.tasks, step.gpus) for name, step in steps.items()}
    assert sizes == {
        "pretrain_real": (1, 8, 8),
        "pretrain_synthetic": (1, 8, 8),
        "mix": (1, 1, 1),
        "finetune": (2, 8, 8),
        "evaluate": (1, 1, 1),
    }
    assert [steps[name].launcher["time"] for name in ("mix", "finetune")] == ["1-00:00:00", "8:00:00"]


def test_an_override_is_given_once_to_a_step_that_is_called_like_its_script() -> None:
    command = load(["experiment=demo", "evaluate:constant=20"]).steps["evaluate"].command
    assert command.count("constant=20") == 1


def test_an_override_with_a_colon_is_for_a_step() -> None:
    assert split(["a=b:c", "finetune:~x.y", "train:a=b:c", "launcher.time=1:00:00"]) == (
        ["a=b:c", "launcher.time=1:00:00"],
        [("finetune", "~x.y"), ("train", "a=b:c")],
    )


WRONG = {
    "an unknown key in the last step": (["evaluate:limt=3"], "step evaluate: "),
    "an unknown option in a later step": (["finetune:model=sphinx_9b"], "step finetune: "),
    "a value that only the script refuses": (["evaluate:limit=0"], "step evaluate: limit=0"),
    "a part that does not exist": (["finetune:stage.train_parts=[decodr]"], "did you mean 'decoder'"),
    "weights given twice": (["mix:weights=[0.5,0.5]"], "step mix: weights and beta are both given"),
    "no such step": (["fintune:seed=1"], "did you mean 'finetune'"),
    "no such step to redo": (["redo=fintune"], "did you mean 'finetune'"),
    "no such experiment": (["experiment=dmo"], "dmo"),
    "no such option of the launcher": (["launcher=slurm", "mix:launcher.partion=x"], "did you mean 'partition'"),
    "an option of the other launcher": (
        ["launcher.partition=gpu"],
        "there is no key launcher.partition; known in launcher: grace, kind",
    ),
    "a time that YAML turned into minutes": (["launcher=slurm", "launcher.time=28800"], "such as 8:00:00"),
    "a time in words": (["launcher=slurm", "mix:launcher.time=2days"], "step mix: launcher.time=2days"),
    "an override of a step that is left out": (["steps.mix=null", "mix:beta=0.3"], "omitted (steps.mix=null)"),
    "a need that does not exist": (["steps.finetune.after=[mxi]"], "did you mean 'mix'"),
    "steps in a circle": (["steps.pretrain_real.after=[evaluate]"], "wait for each other"),
    "two steps in one folder": (["pretrain_synthetic_notext:run=pretrain_synthetic"], "both make"),
    "no model for the next step": (["train:~callbacks.export"], "callbacks.export is missing"),
    "redo and keep": (["redo=mix", "keep=all"], "both name mix"),
    "no number of devices": (["launcher=slurm", "train:trainer.devices=auto"], "trainer.devices=auto"),
}


NEED_ALL_STEPS = ("steps in a circle", "two steps in one folder")


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_in_any_step_is_found_before_the_first_one_starts(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, needle = WRONG[case]
    omitted = [] if case in NEED_ALL_STEPS else without("data", "pretrain_real", "pretrain_synthetic_notext")
    assert main(["experiment=demo", f"output_dir={tmp_path / 'out'}", "dry=true", *omitted, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("error: ")
    assert needle in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stauts", "experiment=demo"]) == 2
    assert (
        capsys.readouterr().err
        == "error: unknown command 'stauts': did you mean 'status'? known: cancel, run, status\n"
    )


def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=demo", f"output_dir={tmp_path / 'out'}", "dry=true"]) == 0
    out = capsys.readouterr().out
    assert "# finetune: not started" in out
    assert f"python train.py experiment=demo stage=finetune output_dir={tmp_path / 'out'}" in out
    assert not (tmp_path / "out").exists()


def test_away_from_the_repository_scripts_are_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(["experiment=demo"]).steps["finetune"].command[1:3] == ("-m", "sphinx_pl.cli.train")


def test_help_names_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx_pl.cli.pipeline", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "status" in done.stdout
    assert "finetune:stage.optim.lr" in done.stdout


def test_an_unknown_experiment_key_is_refused() -> None:
    with pytest.raises(UserError, match=r"steps\.data"):
        load(["experiment=demo", "+steps.data.script=train"])


def test_the_real_recipe_asks_the_ten_questions_before_and_after_each_run() -> None:
    steps = load(["experiment=real"]).steps
    runs = [name for name, step in steps.items() if step.script == "train"]
    assert {*runs} == {
        f"{stage}{text}" for stage in ("pretrain_real", "pretrain_synthetic", "finetune") for text in ("", "_notext")
    }
    asked = {name: step for name, step in steps.items() if name.startswith("ask_")}
    assert set(asked) == {f"ask_{name}" for name in ("language_model", *runs)}
    shown = steps["language_report"].command
    for name, step in asked.items():
        assert steps[name].needs == (name.removeprefix("ask_"),)
        assert str(step.product.parent) in shown
    assert "init_from: outputs/real/mixed" in steps["finetune"].config


def test_the_quick_recipe_has_the_same_steps_with_fewer_of_everything() -> None:
    real, quick = (load([f"experiment={name}"]).steps for name in ("real", "real_quick"))
    assert list(real) == list(quick)
    assert "max_steps: 60" in quick["finetune"].config
    assert "data/real_quick" in quick["finetune"].config
