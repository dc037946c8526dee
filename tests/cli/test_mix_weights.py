from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.cli import mix_weights
from sphinx_pl.data.processor import Processor
from sphinx_pl.evaluation.mixtures.curve import describe_best
from sphinx_pl.mixing.methods import mix_tensors
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY, new_processor, tiny_model
from tests.mixing.conftest import original_folder
from tests.mixing.test_rules import ORIGINAL
from tests.scripts import run_script

SCRIPT = Path(mix_weights.__file__)


@pytest.fixture(scope="module")
def both(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two checkpoints of the tiny model with different weights, `real` and
    `synthetic`.
    """
    folder, config = tmp_path_factory.mktemp("both"), tiny_model()
    processor = new_processor(sample_data, config)
    for seed, name in enumerate(("real", "synthetic")):
        torch.manual_seed(seed)
        write_checkpoint(
            folder / name,
            Sphinx(config).state_dict(),
            config.to_dict(),
            processor.to_dict(),
            processor.tokenizer.path,
            {"stage": name},
        )
    return folder


@pytest.fixture
def parents(tmp_path: Path, both: Path) -> str:
    """Return an override with copies of both checkpoints."""
    shutil.copytree(both, tmp_path, dirs_exist_ok=True)
    return f"checkpoints=[{tmp_path}/real,{tmp_path}/synthetic]"


@pytest.fixture
def plain(tmp_path: Path, processor: Processor) -> list[Path]:
    """Return two checkpoints of a model with encoders whose decoder fits Hugging Face's LLaMA."""
    config = tiny_model()
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, qk_norm=False))
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        tensors, path = Sphinx(config).state_dict(), tmp_path / f"plain_{seed}"
        paths.append(
            write_checkpoint(path, tensors, config.to_dict(), processor.to_dict(), processor.tokenizer.path, {})
        )
    return paths


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the script's main in this process, with these overrides."""

    def run(*overrides: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *overrides])
        mix_weights.main()

    return run


def test_swapping_checkpoints_and_beta_changes_nothing(
    run: Callable[..., None], models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    first, second = models(2, torch.bfloat16)
    for out, overrides in {
        "one": [f"checkpoints=[{first},{second}]", "beta=0.3"],
        "other": [f"checkpoints=[{second},{first}]", "beta=0.7"],
        "rules": [f"checkpoints=[{second},{first}]", "beta=0.5", "rules=[{beta: 0.7}]"],
    }.items():
        run(*overrides, f"out={out}")
    one, *others = (open_checkpoint(tmp_path / name) for name in ("one", "other", "rules"))
    for name in one:
        assert all(same_bits(one.tensor(name), other.tensor(name)) for other in others), name


def test_beta_is_the_first_checkpoints_weight(run: Callable[..., None], parents: str, tmp_path: Path) -> None:
    run(parents, "beta=0.25", "out=mixed")
    run(parents, "weights=[0.25,0.75]", "out=same")
    real, synthetic, mixed, same = (open_checkpoint(tmp_path / name) for name in ("real", "synthetic", "mixed", "same"))
    changed = 0
    for name in real:
        expected = mix_tensors("linear", [real.tensor(name), synthetic.tensor(name)], [0.25, 0.75])
        assert same_bits(mixed.tensor(name), expected), name
        assert same_bits(same.tensor(name), expected), name
        changed += not same_bits(real.tensor(name), expected)
    assert changed > 10
    assert mixed.provenance["mixing"]["method"] == "linear"
    assert mixed.provenance["mixing"]["weights"] == [0.25, 0.75]
    assert [parent["stage"] for parent in mixed.provenance["parents"]] == ["real", "synthetic"]
    mixed.load_into(Sphinx(mixed.model_config))


def test_the_curve_is_that_of_mixed_checkpoints(
    run: Callable[..., None], parents: str, tmp_path: Path, sample_data: Path
) -> None:
    data = [
        f"data.root={sample_data}",
        "data.val_samples=6",
        "data.packing.row_length=256",
        "data.packing.micro_batch_rows=2",
    ]
    run(parents, "beta=0.5", "out=mixed", "curve=3", "curve_sources=[real,synthetic]", *data)
    curve = json.loads((tmp_path / "mixed" / "curve.json").read_text())
    assert curve["betas"] == [0, 0.5, 1]
    assert set(curve["losses"]) == {"real", "synthetic"}
    # The mixed checkpoint, evaluated as the end of another curve, has the loss of the middle.
    run(parents.replace("real", "mixed"), "curve=2", "curve_dir=check", "curve_sources=[synthetic]", *data)
    check = json.loads((tmp_path / "check" / "curve.json").read_text())
    assert list(check["losses"]) == ["synthetic"]
    assert check["losses"]["synthetic"][1] == pytest.approx(curve["losses"]["synthetic"][1], abs=1e-9)
    assert check["losses"]["synthetic"][0] == pytest.approx(curve["losses"]["synthetic"][0], abs=1e-9)
    assert check["losses"]["synthetic"][0] != check["losses"]["synthetic"][1]


@pytest.fixture
def data(sample_data: Path) -> list[str]:
    """Overrides: a few short samples of the sample world."""
    small = ["data.val_samples=8", "data.packing.row_length=256", "data.packing.micro_batch_rows=2"]
    return [f"data.root={sample_data}", "curve_sources=[real,synthetic]", *small]


def test_beta_auto_takes_the_best_point_and_says_why(
    run: Callable[..., None], parents: str, tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(parents, "beta=auto", "curve=3", "out=mixed", *data)
    curve = json.loads((tmp_path / "mixed" / "curve.json").read_text())
    mixing = open_checkpoint(tmp_path / "mixed").provenance["mixing"]
    assert mixing["weights"] == curve["best"]["weights"]
    assert mixing["chosen_by"]["objective"] == "loss"
    assert mixing["chosen_by"]["why"].startswith(f"beta={curve['best']['beta']:g} has the lowest loss of 3 points")
    printed = capsys.readouterr().out
    first, *lines = printed.splitlines()[:4]
    assert first == "Reading the held-out samples of real, synthetic"
    for number, (line, weights) in enumerate(zip(lines, ("0, 1", "0.5, 0.5", "1, 0"), strict=True), 1):
        assert line.startswith(f"Mixing curve  {number}/3  mixing with weights {weights}, then measuring")
        assert line.endswith(" left") == (number > 1)
    text = " ".join(printed.split())
    assert mixing["chosen_by"]["why"] in text
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_curve_of_three_models_with_scores(
    run: Callable[..., None], models: Callable[..., list[Path]], tmp_path: Path, data: list[str]
) -> None:
    paths = ",".join(str(path) for path in models(3))
    tasks = ["curve_tasks=[short_vqa]", "curve_limit=2", "objective=score/short_vqa"]
    run(f"checkpoints=[{paths}]", "curve=2", "curve_dir=curve", *tasks, *data)
    curve = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert curve["models"] == 3
    assert sorted(curve["weights"]) == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert set(curve["losses"]) == {"real", "synthetic"}
    assert len(curve["scores"]["short_vqa"]) == 3
    assert curve["questions"]["short_vqa"] > 0


def test_a_task_that_is_not_asked_is_named(
    run: Callable[..., None], parents: str, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(parents, "curve=3", "curve_dir=c", "curve_tasks=[short_vq]", *data)
    assert "no task 'short_vq': did you mean 'short_vqa'?" in capsys.readouterr().err


def test_a_search_by_part_ends_in_rules(
    run: Callable[..., None], parents: str, tmp_path: Path, data: list[str]
) -> None:
    run(parents, "search=[decoder,projections]", "budget=4", "out=mixed", *data)
    search = json.loads((tmp_path / "mixed" / "search.json").read_text())
    assert search["evaluations"] == 4
    mixed = open_checkpoint(tmp_path / "mixed")
    rules = {rule["tensors"]: rule["weights"][0][0] for rule in mixed.provenance["mixing"]["rules"]}
    assert rules == search["betas"]
    real, synthetic = (open_checkpoint(tmp_path / name) for name in ("real", "synthetic"))
    name, beta = "mixer.visual_proj.0.weight", search["betas"]["projections"]
    expected = mix_tensors("linear", [real.tensor(name), synthetic.tensor(name)], [beta, 1 - beta])
    assert same_bits(mixed.tensor(name), expected)


def test_a_greedy_soup_mixes_the_checkpoints_that_it_keeps(
    run: Callable[..., None], models: Callable[..., list[Path]], tmp_path: Path, data: list[str]
) -> None:
    paths = models(3)
    run(f"checkpoints=[{tmp_path}/model_*]", "method=greedy_soup", "out=soup", *data)
    mixing = open_checkpoint(tmp_path / "soup").provenance["mixing"]
    soup = mixing["chosen_by"]["soup"]
    assert mixing["weights"] == [1 / len(soup) if place in soup else 0.0 for place in range(3)]
    assert len(json.loads((tmp_path / "soup" / "soup.json").read_text())["tried"]) == len(paths) + 2


def test_the_last_checkpoints_of_a_run_by_their_numbers(
    run: Callable[..., None], models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    for path, name in zip(models(4), ("step-9", "step-20", "step-100", ".step-3.tmp"), strict=True):
        path.rename(tmp_path / name)
    run(f"checkpoints=[{tmp_path}/step-*]", "last=2", "method=ema", "options.decay=0.25", "out=mixed")
    provenance = open_checkpoint(tmp_path / "mixed").provenance
    assert [Path(parent["path"]).name for parent in provenance["parents"]] == ["step-20", "step-100"]
    assert provenance["mixing"]["weights"] == [0.25, 0.75]


def test_rules_and_options_from_the_command_line(
    run: Callable[..., None], models: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = models(3)
    rules = "rules=[{match: projections, beta: 1}, {match: decoder, layers: 0-1, beta: [0.25, 0.75]}]"
    run(f"checkpoints=[{paths[0]},{paths[1]}]", "beta=0.5", rules, "out=mixed")
    output = capsys.readouterr().out
    assert "decoder, layers 0-1" in output
    assert "0.25 → 0.75" in output
    mixed, first, second = (open_checkpoint(path) for path in (tmp_path / "mixed", *paths[:2]))
    for name, beta in (
        ("mixer.visual_proj.0.weight", 1.0),
        ("decoder.layers.0.attention.wq.weight", 0.25),
        ("decoder.layers.1.attention.wq.weight", 0.75),
        ("decoder.norm.weight", 0.5),
    ):
        expected = mix_tensors("linear", [first.tensor(name), second.tensor(name)], [beta, 1 - beta])
        assert same_bits(mixed.tensor(name), expected), name
    ties = ["method=ties", "weights=[1,0.6]", "options.density=0.4", f"base={paths[2]}"]
    run(f"checkpoints=[{paths[0]},{paths[1]}]", *ties, "out=ties", "workers=1")
    mixing = open_checkpoint(tmp_path / "ties").provenance["mixing"]
    assert mixing["options"] == {"density": 0.4, "average": True, "scale": 1.0}
    assert "task_cosines" in mixing["parts"]["decoder"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["beta=0.5"], "nothing to do"),
        (["beta=0.5", "out="], "out= is empty"),
        (["beta=0.5", "out=x", "weights=0.5"], "weights: it takes a list"),
        (["out=mixed"], "how much of each"),
        (["out=mixed", "beta=0.5", "weights=[0.5,0.5]"], "both given"),
        (["out=mixed", "weights=[0.5,0.6]"], "sum to 1.1"),
        (["out=mixed", "weights=[1]"], "one per checkpoint"),
        (["out=real", "beta=0.5"], "overwrite=true"),
        (["out=mixed", "beta=half"], "beta"),
        (["out=mixed", "beta=0.5", "method=linaer"], "did you mean 'linear'"),
        (["out=mixed", "betta=0.5"], "betta"),
        (["out=mixed", "beta=0.5", "checkpoints=[real,nothing]"], "'nothing' does not exist"),
        (["out=mixed", "beta=0.5", "checkpoints=[real,real,real]"], "beta is for 2"),
        (["curve=1", "curve_dir=c"], "at least 2"),
        (["curve=3", "beta=0.5", "out=mixed", "curve_sources=[reel]"], "did you mean 'real'"),
        (["curve=3"], "curve_dir=FOLDER"),
        (["curve=3", "curve_dir=c", "curve_sources=[reel]"], "did you mean 'real'"),
        (["curve=3", "curve_dir=c", "precision=bf61"], "did you mean 'bf16'"),
        (["out=mixed", "beta=0.5", "dtype=bf61"], "did you mean 'bf16'"),
        (["out=mixed", "beta=0.5", "layout=safetensors"], "layout=safetensors"),
        (["out=mixed", "beta=0.5", "shards=2"], "layout=original"),
        (["out=mixed", "beta=auto", "rules=[{match: decoder, beta: 0.5}]"], "rules"),
        (["out=mixed", "search=[decoder]", "beta=0.5"], "remove weights, beta and rules"),
        (["out=mixed", "method=greedy_soup", "beta=0.5"], "finds the weights"),
        (["out=mixed", "method=ties", "weights=[1,1]"], "base=FOLDER"),
        (["out=mixed", "beta=0.5", "options.density=0.5"], "method=linear has no such option"),
        (["out=mixed", "beta=0.5", "objective=bleu"], "objective=bleu"),
        (["out=mixed", "weights=[1e308,1e308]", "any_sum=true"], "weights=[1e+308, 1e+308] must be at most 2^53"),
        (["out=mixed", "beta=auto", "curve_dir=mixed/curve"], "curve_dir=mixed/curve is inside out=mixed"),
        (["out=real", "beta=0.5", "overwrite=true", "checkpoints=[real,synthetic]"], "would delete 'real'"),
        (["curve=3", "curve_dir=kept"], "'kept/curve.json' exists"),
        (["out=mixed", "beta=0.5", "rules=[{mach: decoder, beta: 0.5}]"], "mach"),
        (["out=mixed", "beta=0.5", "checkpoints=[step-*]"], "nothing matches 'step-*'"),
        (["out=mixed", "beta=0.5", "checkpoints=[real,'']"], "has an empty name"),
        (["out=mixed", "beta=0.5", "checkpoints=[real,synthetic]", "base="], "base= is empty"),
        (
            ["out=mixed", "beta=0.5", "rules={}"],
            "Cannot merge DictConfig with ListConfig",
        ),
        (["out=.", "beta=0.5"], "out=.: name a new folder"),
        (["beta=auto", "search=[decodr]", "out=mixed", "data.root=DATA"], "search[0].match='decodr' is no part"),
        (["curve=3", "search=[decoder]", "budget=1", "out=mixed", "data.root=DATA"], "budget=1 must be at least 2"),
        (
            ["search=[decoder]", "out=mixed", "data.val_samples=3", "data.root=DATA"],
            "data.val_samples=4 at least",
        ),
        (["out=/proc/foo", "beta=0.5"], "out: '/proc/foo' cannot be a folder"),
        (["out=real/config.json/x", "beta=0.5"], "cannot be a folder (Not a directory)"),
        ([f"out={300 * 'x'}", "beta=0.5"], "(File name too long)"),
        (["curve=3", "curve_dir=real/config.json"], "curve_dir: 'real/config.json' cannot be a folder"),
        (["curve=3", "curve_dir=c", "curve_sources=[]"], "curve_sources= is an empty list"),
        (["curve=3", "curve_dir=c", "objective=loss/reel"], "objective=loss/reel is not measured"),
        (["beta=auto", "out=mixed", "objective=score/short_vqa"], "objective=score/short_vqa is not measured"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    run: Callable[..., None],
    parents: str,
    tmp_path: Path,
    sample_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(mix_weights, "_find", lambda *args: pytest.fail("evaluated first"))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "curve.json").touch()
    overrides = [override.replace("DATA", str(sample_data)) for override in overrides]
    with pytest.raises(SystemExit) as exit_:
        run(*([] if any("checkpoints=" in o for o in overrides) else [parents]), *overrides)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    # These are refused before anything is evaluated or written.
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "outputs") == ["kept", "real", "synthetic"]


def test_a_small_disk_is_reported_before_the_evaluation(
    run: Callable[..., None],
    parents: str,
    tmp_path: Path,
    data: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mix_weights, "_find", lambda *args: pytest.fail("evaluated first"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit):
        run(parents, "beta=auto", "curve=3", "out=new/mixed", *data)
    assert "the disk has 1.0 kB left" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_files_of_an_earlier_curve_are_not_the_mixtures(
    run: Callable[..., None], parents: str, tmp_path: Path, data: list[str]
) -> None:
    stale = tmp_path / ".mixed.curve"
    stale.mkdir()
    (stale / "search.json").write_text("{}")
    run(parents, "beta=auto", "curve=2", "out=mixed", *data)
    assert not (tmp_path / "mixed" / "search.json").exists()
    assert (tmp_path / "mixed" / "curve.json").exists()


def test_the_curve_is_that_of_the_dtype_that_is_written(
    run: Callable[..., None], parents: str, tmp_path: Path, data: list[str]
) -> None:
    run(parents, "beta=0.5", "dtype=bf16", "curve=3", "out=mixed", *data)
    # The written mixture is evaluated at the end of its own curve, in bf16 again.
    run(parents.replace("/real", "/mixed"), "dtype=bf16", "curve=2", "curve_dir=check", *data)
    curve, check = (json.loads((tmp_path / name / "curve.json").read_text()) for name in ("mixed", "check"))
    for source in ("real", "synthetic"):
        assert check["losses"][source][1] == pytest.approx(curve["losses"][source][1], abs=1e-12)
    run(parents, "curve=3", "curve_dir=unrounded", *data)
    other = json.loads((tmp_path / "unrounded" / "curve.json").read_text())
    assert other["losses"]["real"][1] != curve["losses"]["real"][1]


BROKEN = {
    f"decoder.layers.0.feed_forward.{name}.weight": (1.0, 1e30, 1.0) for name in ("w1", "w2", "w3")
}  # finite weights with results that are not


def test_a_model_that_computes_nan_is_never_chosen(
    run: Callable[..., None],
    models: Callable[..., list[Path]],
    tmp_path: Path,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, bad, other = models(3, values=BROKEN)
    run(f"checkpoints=[{bad},{good}]", "beta=auto", "curve=3", "out=auto", *data)
    assert open_checkpoint(tmp_path / "auto").provenance["mixing"]["weights"] == [0, 1]
    assert "no finite one" in " ".join(capsys.readouterr().out.split())
    run(f"checkpoints=[{bad},{good},{other}]", "method=greedy_soup", "out=soup", *data)
    assert 0 not in open_checkpoint(tmp_path / "soup").provenance["mixing"]["chosen_by"]["soup"]
    with pytest.raises(SystemExit):
        run(f"checkpoints=[{bad},{bad}]", "search=[decoder]", "out=search", *data)
    assert "no evaluated model or mixture" in capsys.readouterr().err


def test_dare_draws_for_whole_tensors_when_mixtures_are_evaluated(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original's files hold parts of tensors, which would draw other entries than the
    evaluation does.
    """
    tensors = dict.fromkeys(ORIGINAL, torch.ones(48, 16))
    paths = [original_folder(tmp_path / name, tensors, 2) for name in "abc"]
    own: list[bool] = []
    real = mix_weights._plan

    def plan(*arguments: Any) -> Any:
        own.append(arguments[-1])
        if not own[-1]:
            raise UserError("far enough")
        return real(*arguments)

    monkeypatch.setattr(mix_weights, "_plan", plan)
    mixture = [f"checkpoints=[{paths[0]},{paths[1]}]", f"base={paths[2]}", "out=out"]
    for overrides, flags in ((["method=dare", "beta=auto"], [True, False]), (["method=dare", "weights=[1,1]"], [True])):
        own.clear()
        with suppress(SystemExit):
            run(*mixture, *overrides)
        assert own == flags, capsys.readouterr().err


def test_names_that_look_like_patterns(
    run: Callable[..., None], models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    for path, name in zip(models(2), ("step-1[a]", "r1²2"), strict=True):
        path.rename(tmp_path / name)
    run("checkpoints=['step-1[a]','r1*']", "beta=1", "out=out")
    assert open_checkpoint(tmp_path / "out").provenance["parents"][0]["path"] == "step-1[a]"


def test_a_language_models_layout_says_what_it_omits(
    run: Callable[..., None], plain: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = plain
    run(f"checkpoints=[{a},{b}]", "beta=0.5", "layout=huggingface", "out=hf")
    assert "of encoders and projections are omitted" in " ".join(capsys.readouterr().out.split())
    run(f"checkpoints=[{a},{b}]", "beta=0.5", "out=ours")
    hf, ours = (json.loads((tmp_path / name / "provenance.json").read_text())["parents"] for name in ("hf", "ours"))
    assert [parent["xxh3_128"] for parent in hf] == [parent["xxh3_128"] for parent in ours]


def test_weights_beyond_the_checkpoints_are_noted(
    run: Callable[..., None], parents: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(parents, "beta=5", "out=far")
    assert "weights outside 0 to 1 (everything)" in " ".join(capsys.readouterr().out.split())
    run(parents, "beta=1", "out=near")
    assert "outside" not in capsys.readouterr().out


def test_a_curve_of_a_method_with_a_base_names_its_ends(
    run: Callable[..., None], models: Callable[..., list[Path]], tmp_path: Path, data: list[str]
) -> None:
    a, b, base = models(3)
    run(f"checkpoints=[{a},{b}]", f"base={base}", "method=ties", "curve=3", "curve_dir=curve", *data)
    curve = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert curve["method"] == "ties"
    assert "than ties of the " in describe_best(curve)


def test_the_command_line_sweeps_beta(parents: str, tmp_path: Path) -> None:
    process = run_script([str(REPOSITORY / "mix_weights.py"), "-m", parents, "beta=0,1", "out=mixed_${beta}"], tmp_path)
    assert process.returncode == 0, process.stderr
    for name, parent in (("mixed_1", "real"), ("mixed_0", "synthetic")):
        mixed, original = open_checkpoint(tmp_path / name), open_checkpoint(tmp_path / parent)
        assert all(same_bits(mixed.tensor(key), original.tensor(key)) for key in original)
