"""SPHINX-PL's checkpoints as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

lmms-eval finds it through the entry point `lmms_eval.models`; docs/lmms_eval.md says how to run it.
Only `model.py` and the functions here import lmms-eval, which is not a dependency of this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
"""Tasks that lmms-eval lacks, for its `--include_path`."""


def manifest() -> Any:
    """The `ModelManifest` for lmms-eval's registry. It imports no model, since every run of
    lmms-eval reads it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("sphinx_pl", simple_class_path="sphinx_pl.evaluation.lmms.model.SphinxPL")
