"""The keys of mix_weights.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sphinx_pl.evaluation.objective import Objective
from sphinx_pl.mixing.methods import METHODS, resolve_options
from sphinx_pl.mixing.plan import DTYPES, MixRecipe
from sphinx_pl.mixing.rules import complement
from sphinx_pl.runtime.device import check_precision
from sphinx_pl.settings.data import check_data, names_section
from sphinx_pl.utils.config import refuse_unread
from sphinx_pl.utils.errors import UserError, suggest

AUTO = "auto"
GREEDY = "greedy_soup"


@dataclass
class MixConfig:
    """The keys of conf/mix_weights.yaml with their types. That file explains them."""

    checkpoints: list[str] = field(default_factory=list)
    last: Optional[int] = None
    base: Optional[str] = None
    method: str = "linear"
    weights: Optional[list[float]] = None
    beta: Any = None
    normalize: bool = False
    any_sum: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    rules: list[Any] = field(default_factory=list)
    arithmetic: str = "float64"
    out: Optional[str] = None
    layout: Optional[str] = None
    shards: Optional[int] = None
    dtype: Optional[str] = None
    overwrite: bool = False
    workers: Optional[int] = None
    curve: Optional[int] = None
    curve_dir: Optional[str] = None
    curve_sources: Optional[list[str]] = None
    curve_tasks: Optional[list[str]] = None
    curve_limit: int = 50
    objective: str = "loss"
    search: Optional[list[str]] = None
    budget: int = 20
    device: str = "auto"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.weights is not None and self.beta is not None:
            raise UserError("weights and beta are both given: drop one of them")
        if self.beta is not None and self.beta != AUTO and not _is_number(self.beta):
            raise UserError(f"beta={self.beta} must be a number or auto")
        for name in ("out", "curve_dir", "base"):
            if getattr(self, name) == "":
                raise UserError(f"{name}= is empty: name a folder")
        if self.out is not None and Path(self.out).name in ("", ".."):
            raise UserError(f"out={self.out}: name a new folder")
        if not all(self.checkpoints):
            raise UserError(f"checkpoints={self.checkpoints} has an empty name: name folders")
        for name in ("curve_sources", "curve_tasks", "search"):
            if getattr(self, name) == []:
                raise UserError(f"{name}= is an empty list: remove it, or fill it")
        if self.out is None and self.curve is None and self.search is None:
            raise UserError("nothing to do: give out=FOLDER to write a mixture, or curve=11 to evaluate a curve")
        if self.curve is not None and self.curve < 2:
            raise UserError(f"curve={self.curve} must be at least 2, the two ends")
        if self.measures and self.out is None and self.curve_dir is None:
            raise UserError("the curve has no folder: give curve_dir=FOLDER")
        if self.out and self.curve_dir and Path(self.curve_dir).resolve().is_relative_to(Path(self.out).resolve()):
            raise UserError(
                f"curve_dir={self.curve_dir} is inside out={self.out}, which is the curve's folder by default"
            )
        if self.search is not None and (self.rules or self.weights is not None or _is_number(self.beta)):
            raise UserError("search= finds the weights: remove weights, beta and rules")
        if self.measures and self.rules:
            raise UserError(
                "rules: an evaluated mixture has the same weights in all tensors, or finds those of parts (search=)"
            )
        if self.curve is not None and METHODS[self.method].weights is not None:
            raise UserError(f"curve= varies the weights, which method={self.method} chooses itself: set method=linear")
        if self.method == GREEDY and (self.weights is not None or self.beta is not None or self.rules or self.search):
            raise UserError(f"method={GREEDY} finds the weights: remove weights, beta, rules and search")
        for name in ("last", "shards", "workers", "curve_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype}: {suggest(self.dtype, DTYPES)}")
        Objective(self.objective)
        check_precision(self.precision)

    @property
    def finds(self) -> bool:
        """Whether evaluations determine the weights."""
        return self.beta == AUTO or self.search is not None or self.method == GREEDY

    @property
    def measures(self) -> bool:
        """Whether mixtures are evaluated."""
        return self.finds or self.curve is not None

    def recipe(self, count: int) -> MixRecipe:
        """Return the recipe for this number of checkpoints.

        Equal weights stand for weights that are not found yet.

        Raises:
            UserError: the keys contradict each other.
        """
        weights = self.weights
        if self.finds:
            weights = [1 / max(count, 1)] * count
        elif self.beta is not None:
            if count != 2:
                raise UserError(f"beta is for 2 checkpoints, not {count}: give weights=[...] instead")
            weights = [self.beta, complement(self.beta)]
        elif self.out is None and weights is None and not self.rules and METHODS[self.method].weights is None:
            weights = [1 / max(count, 1)] * count  # a curve alone varies the weights itself
        recipe = MixRecipe(
            weights, self.method, self.options, self.rules, self.normalize, self.any_sum, self.arithmetic
        )
        recipe.check(count, self.base is not None)
        return recipe

    def paths(self) -> list[str]:
        """Return the checkpoints.

        A pattern stands for the paths that match it, in the order of the numbers in their names.

        Raises:
            UserError: nothing matches a pattern.
        """
        paths: list[str] = []
        for path in self.checkpoints:
            if not set(path) & set("*?[") or Path(path).exists():
                paths.append(path)
            elif matches := _matches(path):
                paths += matches
            else:
                raise UserError(f"checkpoints: nothing matches '{path}': check the path")
        return paths[-self.last :] if self.last else paths


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _matches(pattern: str) -> list[str]:
    root = Path(pattern).anchor
    paths = Path(root or ".").glob(pattern.removeprefix(root))
    return sorted((str(path) for path in paths if not path.name.startswith(".")), key=_by_numbers)


def _by_numbers(path: str) -> list[tuple[int, str]]:
    """Return a sort key in which step-20 comes before step-100."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"([0-9]+)", path)]


def check_mix(cfg: DictConfig) -> None:
    """Check that every key of the configuration is read.

    `data`, whose check imports torch, is checked only if it matters.

    Raises:
        UserError: a key is not read.
    """
    refuse_unread(cfg, "", [*MixConfig.__dataclass_fields__, "data"])
    resolve_options(cfg.get("method", "linear"), cfg.get("options") or {})
    if not HydraConfig.initialized() or cfg.get("curve") or names_section(HydraConfig.get().overrides.task, "data"):
        check_data(cfg)
