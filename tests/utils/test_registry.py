"""An unknown name is answered with the nearest known name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sphinx_pl.checkpoints.format import FORMATS
from sphinx_pl.cli.convert import main as convert
from sphinx_pl.data.converters import CONVERTERS
from sphinx_pl.data.readers import READERS
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.benchmarks import BENCHMARKS
from sphinx_pl.evaluation.scorers.tasks import SCORERS
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.registry import Registry


@pytest.fixture
def colours() -> Registry[int]:
    registry: Registry[int] = Registry("colour")
    for number, name in enumerate(("red", "green", "blue")):
        assert registry.register(name, number) == number
    return registry


def test_it_is_a_mapping_in_the_order_of_registration(colours: Registry[int]) -> None:
    assert list(colours) == ["red", "green", "blue"]
    assert dict(colours) == {"red": 0, "green": 1, "blue": 2}
    assert len(colours) == 3
    assert "red" in colours
    assert "pink" not in colours


def test_unknown_names_suggest(colours: Registry[int]) -> None:
    with pytest.raises(UserError, match=r"^unknown colour 'gren': did you mean 'green'\? known: blue, green, red$"):
        colours["gren"]
    with pytest.raises(UserError, match=r"^unknown colour 'xyz': known: blue, green, red$"):
        colours["xyz"]
    assert suggest("bleu", colours) == "did you mean 'blue'? known: blue, green, red"
    assert suggest("xyz", ["b", "a", "b"]) == "known: a, b"


def test_what_lists_many_names_is_named_instead_of_them() -> None:
    names = [f"name{i:02}" for i in range(13)]
    assert suggest("nam07", names, "docs/names.md") == "did you mean 'name07'? docs/names.md lists them"
    assert suggest("xyz", names, "docs/names.md") == "docs/names.md lists them"
    assert suggest("xyz", names[:12], "docs/names.md").startswith("known: name00, name01")
    assert suggest("xyz", names).endswith("name11, name12")
    registry: Registry[int] = Registry("name", "docs/names.md")
    for name in names:
        registry.register(name, 0)
    with pytest.raises(UserError, match=r"^unknown name 'xyz': docs/names\.md lists them$"):
        registry["xyz"]


@pytest.mark.parametrize("registry", [TASKS, BENCHMARKS, CONVERTERS])
def test_what_is_said_to_list_the_names_does(
    registry: Registry[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    if registry.listed == "python -m sphinx_pl.cli.convert":
        assert convert([]) == 0
        text = capsys.readouterr().out
    else:
        text = (Path(__file__).parents[2] / registry.listed).read_text()
    assert [name for name in registry if not re.search(rf"[ `]{re.escape(name)}[ `,}}]", text)] == []


def test_a_name_is_registered_once(colours: Registry[int]) -> None:
    with pytest.raises(ValueError, match="colour 'red' is registered twice"):
        colours.register("red", 9)
    assert colours["red"] == 0


@pytest.mark.parametrize(
    ("registry", "typo", "meant"),
    [
        (TASKS, "short_vqua", "short_vqa"),
        (READERS, "instruction", "instructions"),
        (SCORERS, "box_iou5", "box_iou50"),
        (FORMATS, "sphinx-pl", "sphinx_pl"),
    ],
)
def test_the_projects_registries_suggest(registry: Registry[object], typo: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown {registry.kind} '{typo}': did you mean '{meant}'"):
        registry[typo]


def test_every_task_has_a_scorer() -> None:
    assert {task.scorer for task in TASKS.values()} - {"none"} <= set(SCORERS)
