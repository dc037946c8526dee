"""An unknown name is answered with the nearest known one."""

from __future__ import annotations

import pytest

from sphinx_pl.checkpoint.format import FORMATS
from sphinx_pl.data.sources import SOURCES
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.errors import UserError, suggest
from sphinx_pl.evaluation.metrics import METRICS
from sphinx_pl.registry import Registry


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
    with pytest.raises(UserError, match=r"^unknown colour 'gren': did you mean 'green'\?$"):
        colours["gren"]
    with pytest.raises(UserError, match=r"^unknown colour 'xyz': known: blue, green, red$"):
        colours["xyz"]
    assert suggest("bleu", colours) == "did you mean 'blue'?"


def test_a_name_is_registered_once(colours: Registry[int]) -> None:
    with pytest.raises(ValueError, match="colour 'red' is registered twice"):
        colours.register("red", 9)
    assert colours["red"] == 0


@pytest.mark.parametrize(
    ("registry", "typo", "meant"),
    [
        (TASKS, "short_vqua", "short_vqa"),
        (SOURCES, "instruction", "instructions"),
        (METRICS, "box_iou5", "box_iou50"),
        (FORMATS, "sphinx-pl", "sphinx_pl"),
    ],
)
def test_the_projects_registries_suggest(registry: Registry[object], typo: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown {registry.kind} '{typo}': did you mean '{meant}'"):
        registry[typo]


def test_every_task_has_a_scorer() -> None:
    assert {task.scorer for task in TASKS.values()} - {"none"} <= set(METRICS)
