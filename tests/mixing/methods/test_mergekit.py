"""Equality with mergekit 0.1.5 on small models: `tests/golden/make_mergekit.py` made its results."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sphinx_pl.mixing.methods import mix_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "mergekit.safetensors"


@cache
def golden() -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Model or merge -> tensors; the settings."""
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(str(GOLDEN), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            model, _, name = key.partition("/")
            found.setdefault(model, {})[name] = file.get_tensor(key)
        return found, json.loads(file.metadata()["settings"])


# merge -> method, models, weights, base, options
MERGES: dict[str, tuple[str, str, list[float], str | None, dict[str, Any]]] = {
    "linear": ("linear", "ab", [0.3, 0.7], None, {}),
    "linear_normalized": ("linear", "ab", [0.25, 0.75], None, {}),
    "linear_not_normalized": ("linear", "ab", [0.3, 0.9], None, {}),
    "slerp": ("slerp", "ab", [0.6, 0.4], None, {}),
    "task_arithmetic": ("task_arithmetic", "ab", [0.7, 0.5], "base", {}),
    "ties_normalized": ("ties", "ab", [1.0, 0.6], "base", {"density": 0.4}),
    "ties_not_normalized": ("ties", "ab", [1.0, 0.6], "base", {"density": 0.4, "average": False}),
    "model_stock_of_2": ("model_stock", "ab", [1 / 2] * 2, "base", {}),
    "model_stock_of_3": ("model_stock", "abc", [1 / 3] * 3, "base", {}),
}


def test_the_golden_results_are_of_these_merges() -> None:
    found, settings = golden()
    assert settings["versions"]["mergekit"] == "0.1.5"
    assert set(MERGES) | {"base", "a", "b", "c", "linear_of_3"} == set(found)


@pytest.mark.parametrize("merge", MERGES)
def test_mixtures_are_mergekits_within_rounding(merge: str) -> None:
    method, models, weights, base, options = MERGES[merge]
    found, _ = golden()
    names = list(found["base"])
    if method == "model_stock":
        # There mergekit takes cosines of small offsets as smaller than they are, and a t below 0 as it is.
        odd = ("layers.1.input_layernorm", "layers.1.post_attention_layernorm", "lm_head")
        names = [name for name in names if not any(part in name for part in odd)]
    assert len(names) > 10
    for name in names:
        mixed = mix_tensors(
            method,
            [found[model][name] for model in models],
            weights,
            found[base][name] if base else None,
            **options,
        )
        torch.testing.assert_close(
            mixed, found[merge][name], rtol=2**-21, atol=2**-22, msg=lambda m, n=name: f"{n}: {m}"
        )
