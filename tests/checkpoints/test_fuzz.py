"""Damaged checkpoints load, or are refused in one line; they never run code or fail later."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.conftest import tiny_model
from tests.fuzzing import damaged

HEAD = 4096  # bytes of a file that are damaged: its structure, not the numbers in the weights


def fuzz(whole: Path, folder: Path, rounds: int) -> dict[str, Counter[str]]:
    """Each file in turn is damaged `rounds` times."""
    folder.mkdir()
    counts: dict[str, Counter[str]] = {}
    model = Sphinx(tiny_model())
    originals = {path.name: path.read_bytes() for path in whole.iterdir()}
    for name, content in originals.items():
        (folder / name).write_bytes(content)
    for name, content in originals.items():
        counts[name] = Counter()
        for seed in range(rounds):
            (folder / name).write_bytes(damaged(content[:HEAD], random.Random(f"{name} {seed}")) + content[HEAD:])
            try:
                checkpoint = open_checkpoint(folder)
                checkpoint.load_into(model)
                Processor.from_dict(checkpoint.processor, checkpoint.tokenizer_file, checkpoint.model_config)
                counts[name]["read"] += 1
            except UserError:
                counts[name]["refused"] += 1
            except Exception as error:
                error.add_note(f"{name}, seed {seed}")
                raise
        (folder / name).write_bytes(content)
    return counts


@pytest.mark.parametrize("rounds", [4, pytest.param(150, marks=pytest.mark.long)])
def test_a_damaged_checkpoint_loads_or_is_refused(rounds: int, processor: Processor, tmp_path: Path) -> None:
    config = tiny_model()
    write_checkpoint(
        tmp_path / "whole",
        Sphinx(config).state_dict(),
        config.to_dict(),
        processor.to_dict(),
        Path(processor.tokenizer.path),
        {"stage": "none"},
    )
    result = fuzz(tmp_path / "whole", tmp_path / "damaged", rounds)
    for name, counted in result.items():
        print(name, dict(counted))
        assert counted["refused"] > 0, name
