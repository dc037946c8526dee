from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mix_weights
from sphinx_pl.checkpoint.format import open_checkpoint, same_bits, write_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.mixing.methods import mix_tensors
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx

SCRIPT = Path(mix_weights.__file__)


@pytest.fixture
def parents(tmp_path: Path, model_config: SphinxConfig, processor: Processor) -> str:
    """Two checkpoints of the tiny model with different weights, `real` and `synthetic`, as an override."""
    for seed, name in enumerate(("real", "synthetic")):
        torch.manual_seed(seed)
        write_checkpoint(
            tmp_path / name,
            Sphinx(model_config).state_dict(),
            model_config.to_dict(),
            processor.to_dict(),
            processor.tokenizer.path,
            {"stage": name},
        )
    return f"checkpoints=[{tmp_path}/real,{tmp_path}/synthetic]"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The script's main in this process, with these overrides."""

    def run(*overrides: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *overrides])
        mix_weights.main()

    return run


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
    data = [f"data.root={sample_data}", "data.val_samples=6", "data.packing.row_length=256", "data.packing.rows=2"]
    run(parents, "beta=0.5", "out=mixed", "curve=3", "curve_sources=[real,synthetic]", *data)
    curve = json.loads((tmp_path / "mixed" / "curve.json").read_text())
    assert curve["betas"] == [0, 0.5, 1]
    assert set(curve["losses"]) == {"real", "synthetic"}
    # The mixed checkpoint, evaluated by itself as the end of another curve, has the loss of the middle.
    run(parents.replace("real", "mixed"), "curve=2", "curve_dir=check", "curve_sources=[synthetic]", *data)
    check = json.loads((tmp_path / "check" / "curve.json").read_text())
    assert list(check["losses"]) == ["synthetic"]
    assert check["losses"]["synthetic"][1] == pytest.approx(curve["losses"]["synthetic"][1], abs=1e-9)
    assert check["losses"]["synthetic"][0] == pytest.approx(curve["losses"]["synthetic"][0], abs=1e-9)
    assert check["losses"]["synthetic"][0] != check["losses"]["synthetic"][1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["beta=0.5"], "nothing to do"),
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
    ],
)
def test_mistakes_are_answered_in_one_line(
    run: Callable[..., None],
    parents: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(*([] if any("checkpoints=" in o for o in overrides) else [parents]), *overrides)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "mixed").exists()


def test_the_command_line_sweeps_beta(parents: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "-m", parents, "beta=0,1", "out=mixed_${beta}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    for name, parent in (("mixed_1", "real"), ("mixed_0", "synthetic")):
        mixed, original = open_checkpoint(tmp_path / name), open_checkpoint(tmp_path / parent)
        assert all(same_bits(mixed.tensor(key), original.tensor(key)) for key in original)
