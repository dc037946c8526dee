"""Renamed configuration keys: the old key is answered with the new one, in files and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.data.sampling.config import Group
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.renamed import new_key, with_new_keys
from tests.scripts import run_script
from tests.settings.test_settings import refusal

RENAMED = {
    "stage.rows_per_step": "stage.global_batch_rows",
    "data.packing.rows": "data.packing.micro_batch_rows",
    "data.mixing.lanes": "data.mixing.partitions",
    "recipe.finetune.towers": "recipe.finetune.vits",
    "data.sources.real.branches": "data.sources.real.questions_per_sample",
    "data.val_sources.real.branches": "data.val_sources.real.questions_per_sample",
}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_of_a_file_is_answered_with_the_new_one(old: str) -> None:
    first, *others = reversed(old.split("."))
    changes = f"{{{first}: 4}}"
    for part in others:
        changes = f"{{{part}: {changes}}}"
    assert refusal("train", changes) == f"{old} is called {RENAMED[old]} now"


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("stage.rows_per_step=4", "stage.rows_per_step is called stage.global_batch_rows now"),
        ("+data.mixing.lanes=4", "data.mixing.lanes is called data.mixing.partitions now"),
        ("name=${data.packing.rows}", "data.packing.rows is called data.packing.micro_batch_rows now"),
    ],
)
def test_an_old_key_of_the_command_line_is_answered_with_the_new_one(override: str, answer: str) -> None:
    result = run_script(["train.py", override, "plan=true"])
    assert result.returncode == 2
    assert answer in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_old_key_of_a_source_in_a_group_is_answered_with_its_place() -> None:
    source = {"kind": "text", "path": str(Path(__file__)), "branches": 2}
    with pytest.raises(UserError, match=r"data\.sources\.g\.sources\.a\.branches is called .*\.questions_per_sample"):
        Group.from_dict({"sources": {"g": {"sources": {"a": source}}}})


def test_an_older_configuration_is_read_with_the_new_keys() -> None:
    old = {
        "stage": {"rows_per_step": 4, "clip": 1.0},
        "data": {"packing": {"rows": 2}, "sources": {"a": {"branches": 3, "path": "x"}}, "branches": 1},
    }
    assert with_new_keys(old) == {
        "stage": {"global_batch_rows": 4, "clip": 1.0},
        "data": {
            "packing": {"micro_batch_rows": 2},
            "sources": {"a": {"questions_per_sample": 3, "path": "x"}},
            "branches": 1,
        },
    }
    assert new_key("stage.global_batch_rows") is None
