from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import towers
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx


def test_dependence_is_the_share_that_changes_with_the_image() -> None:
    places = torch.randn(1, 5, 3)
    assert towers.dependence(places.expand(4, 5, 3)) == 0  # places differ, images do not
    assert towers.dependence(torch.tensor([[[1.0]], [[-1.0]]])) == 1
    assert towers.dependence(torch.tensor([[[3.0]], [[5.0]]])) == pytest.approx((1 / 17) ** 0.5)


def test_a_collapsed_tower_stands_out(
    tmp_path: Path,
    sample_data: Path,
    model_config: SphinxConfig,
    processor: Processor,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    model = Sphinx(model_config)
    state = model.state_dict()
    for name in state:
        if name.startswith("mixer.towers.clip.model.conv1"):  # it reads no pixel any more
            state[name] = torch.zeros_like(state[name])
    write_checkpoint(
        tmp_path / "blind", state, model_config.to_dict(), processor.to_dict(), processor.tokenizer.path, {}
    )
    images = f"--images={sample_data}/instructions/images/test-*.jpg"
    assert towers.main([str(tmp_path / "blind"), images, "--limit=4"]) == 0
    table = capsys.readouterr().out
    new, blind = (line.split("│")[2:-1] for line in table.splitlines() if "new weights" in line or "blind" in line)
    assert len(new) == 5
    assert all(float(value) > 0.05 for value in new)
    assert float(blind[0]) == 0 < float(blind[1])


@pytest.mark.parametrize("arguments", [["absent"], ["CHECKPOINT", "--images=absent/*.jpg"]])
def test_mistakes_are_one_line(
    arguments: list[str],
    tmp_path: Path,
    model_config: SphinxConfig,
    processor: Processor,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    state = Sphinx(model_config).state_dict()
    write_checkpoint(folder, state, model_config.to_dict(), processor.to_dict(), processor.tokenizer.path, {})
    assert towers.main([argument.replace("CHECKPOINT", str(folder)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "absent" in error
