"""How held-out sources weigh in the loss that a sweep minimises; worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sphinx_pl.data.held_out import held_out_weights
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER


@pytest.fixture
def source(tmp_path: Path) -> Any:
    """A source of so many records of each task."""

    def source(name: str, weight: float = 1.0, **tasks: int) -> dict[str, Any]:
        about = {"image": "a.png", "question": "Which?", "answer": "yes"}
        entries = [about | {"task": task, "id": f"{task}{i}"} for task, n in tasks.items() for i in range(n)]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
        return {"kind": "instructions", "path": str(tmp_path / f"{name}.json"), "weight": weight}

    return source


def test_a_source_of_the_same_name_gets_the_share(source: Any) -> None:
    sources = {"a": source("a", 3, chat=1), "group": {"sources": {"b": source("b", 1, chat=1)}, "weight": 1}}
    held_out = {name: source(name, chat=2) for name in ("a", "b", "c")}
    assert held_out_weights(sources, held_out) == {"a": 0.75, "b": 0.25, "c": 0}


def test_other_shares_go_to_who_holds_the_task(source: Any) -> None:
    # A quarter of "more" is captions, which two sources hold; nobody holds its yes_no.
    sources = {"text": source("text", 2, chat=1), "more": source("more", 2, short_vqa=2, caption=1, yes_no=1)}
    held_out = {
        "text": source("t", chat=1),
        "tasks": source("tasks", short_vqa=5, caption=1),
        "pairs": source("pairs", caption=9),
        "relations": source("relations", relation=1),
        "off": None,
    }
    measured = 0.5 + 0.25 + 0.125  # all but yes_no
    expected = {
        "text": 0.5 / measured,
        "tasks": (0.25 + 0.0625) / measured,
        "pairs": 0.0625 / measured,
        "relations": 0,
    }
    assert held_out_weights(sources, held_out) == pytest.approx(expected)


def test_all_weigh_alike_where_nothing_of_them_is_trained(source: Any) -> None:
    held_out = {name: source(name, caption=1) for name in "ab"}
    assert held_out_weights({"c": source("c", chat=1)}, held_out) == {"a": 0.5, "b": 0.5}
    assert held_out_weights({"c": source("c", chat=1)}, {}) == {}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("pretrain_real", {"real": 0.8, "synthetic": 0, "text": 0.2}),
        ("pretrain_synthetic", {"real": 0, "synthetic": 0.8, "text": 0.2}),
        # Captions are not trained on: the pairs' losses, which are larger, have no say.
        ("finetune", {"real": 0, "synthetic": 0, "text": 0.06, "tasks": 0.94}),
    ],
)
def test_the_demos_stages(stage: str, expected: dict[str, float], sample_data: Path) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = compose("train", overrides=[f"data/mixture=sample_{stage}", f"data.root={sample_data}"])
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    assert held_out_weights(data["sources"], data["val_sources"]) == pytest.approx(expected, abs=1e-6)
