"""docs/own_data.md leads from 200 pictures and 50 conversations to a model and a chat, by its own
commands.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.test_train import SMALL
from tests.conftest import REPOSITORY
from tests.scripts import run_script

PAGE = (REPOSITORY / "docs" / "own_data.md").read_text()


def commands() -> list[list[str]]:
    """Return the commands of the page, in its order."""
    blocks = re.findall(r"```\n((?:python|sphinx-data) .*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return the page's files: its own examples and more like them."""
    table = re.search(r"```\n(image,caption\n.*?)```", PAGE, re.DOTALL)
    chats = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert table
    assert chats
    (tmp_path / "photos").mkdir()
    for i in range(200):
        Image.new("RGB", (32, 24), (i, 255 - i, 90)).save(tmp_path / "photos" / f"{i:03d}.png")
    more = "".join(f"photos/{i:03d}.png,a picture with the number {i}\n" for i in range(2, 200))
    (tmp_path / "photos.csv").write_text(table[1] + more)
    alone, about_one = json.loads(chats[1])
    entries = [about_one | {"image": f"photos/{i:03d}.png"} for i in range(25)]
    (tmp_path / "chats.json").write_text(json.dumps([alone] * 25 + entries))
    return tmp_path


@pytest.mark.parametrize("there", [["photos.csv"], ["chats.json"], ["photos.csv", "chats.json"]])
def test_sources_that_you_do_not_have_are_skipped(files: Path, there: list[str]) -> None:
    from sphinx_pl.cli.data import composed

    composed(["experiment=own", *(f"data.sources.{name.partition('.')[0]}.path={files / name}" for name in there)])


def test_the_pages_commands_train_a_model_that_answers(files: Path, sample_data: Path) -> None:
    table, train, chat = commands()
    train_arguments = [argument.replace("path=", f"path={files}/") for argument in train]
    small = [
        *(item for item in SMALL if not item.startswith("data.packing")),
        "stage.max_steps=2",
        "data.packing.micro_batch_rows=1",
        "data.packing.row_length=128",
        "data.processor.max_length=128",
        "stage.init_from=null",
        f"data.tokenizer={sample_data}/tokenizer.model",
        f"output_dir={files}/outputs/own",
    ]
    result = run_script([*train_arguments[1:], *small])
    assert result.returncode == 0, result.stderr
    for name in ("photos", "chats"):
        assert re.search(rf"held out .*{name} \d", result.stdout)
    assert "skipped/" not in result.stdout
    chat_arguments = [argument.replace("=", f"={files}/", 1) for argument in chat[2:]]
    result = run_script([chat[1], *chat_arguments, "question='What is in the picture?'", "generation.max_new_tokens=4"])
    assert result.returncode == 0, result.stderr
    # The table lists the same files, and a tenth of each is held out.
    from omegaconf import OmegaConf

    from sphinx_pl.cli.data import composed
    from sphinx_pl.data.datamodule import DataModule
    from sphinx_pl.data.inspect.table import lines, reasons
    from sphinx_pl.models.config import SphinxConfig

    assert table[:2] == ["sphinx-data", "table"]
    overrides = [argument.replace("path=", f"path={files}/") for argument in table[2:]]
    cfg = composed([*overrides, f"data.tokenizer={sample_data}/tokenizer.model"])
    values = OmegaConf.to_container(cfg.data, resolve=True)
    assert isinstance(values, dict)
    rows = lines(DataModule.from_config(values, SphinxConfig.from_dict(cfg.model)), probe=8)  # type: ignore[arg-type]
    assert {line.name: line.records for line in rows} == {"photos": 180, "chats": 45}
    assert reasons(rows) == ""
