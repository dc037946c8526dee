"""A mixture as a plan: checkpoints that go together, and the weights of every tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from sphinx_pl.checkpoints.format import Checkpoint, ModelFolder, with_common_names
from sphinx_pl.checkpoints.huggingface import open_model
from sphinx_pl.checkpoints.tensors import compare
from sphinx_pl.mixing.methods import METHODS, resolve_options
from sphinx_pl.mixing.mixer import Mixer
from sphinx_pl.mixing.rules import OTHER, RuleRow, part_of, resolve, rules_table
from sphinx_pl.utils.errors import UserError, suggest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ARITHMETIC = {"float32": torch.float32, "float64": torch.float64}


def check_weights(weights: Sequence[float], count: int, normalize: bool = False, any_sum: bool = False) -> list[float]:
    """Coefficients for `count` checkpoints, which sum to 1 unless `any_sum`.

    Raises:
        UserError: another number of them, not finite, or a sum further than 1e-6 from 1 without
            `normalize`.
    """
    if len(weights) != count:
        raise UserError(f"weights has {len(weights)} numbers for {count} checkpoints: give one per checkpoint")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"weights={list(weights)} must be finite numbers")
    try:
        total = math.fsum(weights)
    except OverflowError:
        raise UserError(f"weights={list(weights)} are too large to be summed") from None
    if normalize and total == 0:
        raise UserError(f"weights={list(weights)} sum to 0 and cannot be normalized")
    if any_sum and not normalize:
        return list(weights)
    if not normalize and abs(total - 1) > 1e-6:
        raise UserError(
            f"weights={list(weights)} sum to {total:g}, not 1: change them, or set normalize=true (divides by the sum) "
            "or any_sum=true (takes them as they are)"
        )
    return [weight / total for weight in weights] if total != 1 else list(weights)


@dataclass(frozen=True)
class MixRecipe:
    """The options of a mixing, apart from the checkpoints; conf/mix_weights.yaml has them."""

    weights: Sequence[float] | None = None
    method: str = "linear"
    options: Mapping[str, Any] | None = None
    rules: Sequence[Mapping[str, Any]] = ()
    normalize: bool = False
    any_sum: bool = False
    arithmetic: str = "float64"

    def check(self, count: int, base: bool) -> dict[str, Any]:
        """The method's options, complete.

        Raises:
            UserError: method, options, weights and the number of checkpoints do not go together.
        """
        method, options = METHODS[self.method], resolve_options(self.method, self.options or {})
        if count < (1 if method.base else 2):
            raise UserError(f"checkpoints has {count} entries: mixing needs at least two")
        if method.count is not None and count != method.count:
            raise UserError(f"method={self.method} is for {method.count} checkpoints, not {count}")
        if method.base and not base:
            raise UserError(f"method={self.method} starts from a base model: give base=FOLDER")
        if base and not method.base:
            based = ", ".join(name for name, other in METHODS.items() if other.base)
            raise UserError(f"method={self.method} has no base: leave base out, or choose one that has: {based}")
        if self.arithmetic not in ARITHMETIC:
            raise UserError(f"arithmetic={self.arithmetic}: {suggest(self.arithmetic, ARITHMETIC)}")
        if method.weights is not None and (self.weights is not None or self.rules):
            raise UserError(f"method={self.method} chooses the weights itself: leave out weights, beta and rules")
        self.weights_for_the_rest(count, options)
        return options

    def weights_for_the_rest(self, count: int, options: Mapping[str, Any]) -> list[float] | None:
        """The weights of tensors that no rule fits.

        Raises:
            UserError: there are none, and no rules either.
        """
        method = METHODS[self.method]
        if method.weights is not None:
            return method.weights(count, options)
        if self.weights is not None:
            return self.checked(self.weights, count)
        if not self.rules:
            raise UserError("how much of each checkpoint? Give weights=[...], or beta=0.5 for two")
        return None

    def checked(self, weights: Sequence[float], count: int) -> list[float]:
        return check_weights(weights, count, self.normalize, self.any_sum or METHODS[self.method].base)


@dataclass(frozen=True)
class MixPlan:
    """A mixture that can be made: its inputs go together, every tensor has its weights."""

    models: list[ModelFolder]
    base: ModelFolder | None
    recipe: MixRecipe
    options: dict[str, Any]
    weights: dict[str, list[float]]
    rows: list[RuleRow]

    @property
    def inputs(self) -> list[ModelFolder]:
        """The models and, behind them, the base."""
        return self.models if self.base is None else [*self.models, self.base]

    def mixer(self, watch: bool = True) -> Mixer:
        return Mixer(
            self.models,
            self.weights,
            self.recipe.method,
            self.options,
            self.base,
            ARITHMETIC[self.recipe.arithmetic],
            watch,
        )

    def notes(self) -> list[str]:
        """A line for each difference beside the weights, and for tensors of no known part."""
        first, *others = self.inputs
        notes = [f"'{other.path}' beside '{first.path}': {note}" for other in others if (note := first.note(other))]
        by_parts = any(row.parts for row in self.rows)
        if unknown := [key for key in self.weights if by_parts and part_of(first.canonical_name(key)) == OTHER]:
            names = ", ".join(f"'{key}'" for key in unknown[:3])
            notes.append(f"{len(unknown)} tensors belong to no part of a model that is known here, such as {names}")
        return notes

    def table(self) -> Group:
        """The checkpoints by their numbers, and the rules as they were understood."""
        paths = [Text(f"{place}  {model.path}", overflow="fold") for place, model in enumerate(self.models)]
        base = [Text(f"base  {self.base.path}", overflow="fold")] if self.base else []
        method = Text(f"{self.recipe.method}: {METHODS[self.recipe.method].paper}")
        first = self.models[0]
        # What every rank's file has whole is one tensor.
        numels = {key: first.info(key).numel if key in first.parts(key) else 0 for key in self.weights}
        beyond = [
            Text(f"Note: weights outside 0 to 1 ({row.label}) go beyond the checkpoints, not between them")
            for row in self.rows
            if not METHODS[self.recipe.method].base and any(not 0 <= w <= 1 for point in row.weights for w in point)
        ]
        return Group(method, *paths, *base, rules_table(self.rows, numels, len(self.models)), *beyond)


def open_models(
    checkpoints: Sequence[str | Path | Checkpoint], base: str | Path | None = None, own: bool = True
) -> tuple[list[ModelFolder], ModelFolder | None]:
    """The checkpoints and the base, under names that all of them have in common (see
    `with_common_names`).

    Raises:
        UserError: one cannot be opened.
    """
    paths = [*checkpoints, *([] if base is None else [base])]
    opened = [path if isinstance(path, Checkpoint) else open_model(path) for path in paths]
    models = with_common_names(opened, own)
    return (models, None) if base is None else (models[:-1], models[-1])


def plan_mixture(
    models: Sequence[ModelFolder], base: ModelFolder | None, recipe: MixRecipe, cast: bool = False
) -> MixPlan:
    """Check that the models can be mixed and which weights each tensor gets.

    Args:
        cast: whether tensors may have other dtypes in other models.

    Raises:
        UserError: see `MixRecipe.check`, `check_compatible` and `resolve`.
    """
    count = len(models)
    options = recipe.check(count, base is not None)
    check_compatible([*models, *([] if base is None else [base])], cast)
    names = {key: models[0].canonical_name(key) for key in models[0]}
    rest = recipe.weights_for_the_rest(count, options)
    weights, rows = resolve(recipe.rules, rest, names, lambda given: recipe.checked(given, count))
    return MixPlan(list(models), base, recipe, options, weights, rows)


def check_compatible(models: Sequence[ModelFolder], cast: bool = False) -> None:
    """Whether a mixture of these models means anything.

    Raises:
        UserError: another model, prompt format, tokenizer, set of tensors, shape or (without
            `cast`) dtype.
    """
    first = models[0]
    for model in models:
        model.check_numbers()
        for key in model:
            dtype = model.info(key).dtype
            # Masks and counters may have 8 bits, matrices that are multiplied have not.
            if dtype.itemsize == 1 and (dtype.is_floating_point or key.endswith("weight")):
                raise UserError(
                    f"'{key}' in '{model.path}' is {dtype}, a quantized model's: mix what it was quantized from"
                )
    shapes = {key: first.info(key).shape for key in first}
    for other in models[1:]:
        names = f"'{first.path}' and '{other.path}'"
        if problem := first.compare(other):
            raise UserError(f"{names} cannot be mixed: {problem}: mix checkpoints that were trained from the same one")
        if problem := compare(shapes, {key: other.info(key).shape for key in other}):
            raise UserError(f"'{other.path}' does not have the tensors of '{first.path}': {problem}")
        for key in shapes:
            dtypes = first.info(key).dtype, other.info(key).dtype
            if dtypes[0] != dtypes[1] and not any(dtype.is_floating_point for dtype in dtypes):
                raise UserError(
                    f"'{key}' is {dtypes[0]} in '{first.path}' but {dtypes[1]} in '{other.path}': integers of two "
                    "dtypes cannot be mixed, write one of the models again"
                )
            if dtypes[0].is_floating_point != dtypes[1].is_floating_point:
                raise UserError(
                    f"'{key}' is {dtypes[0]} in '{first.path}' but {dtypes[1]} in '{other.path}', which "
                    "cannot be mixed: mix what the quantized one was made from"
                )
            if dtypes[0] != dtypes[1] and not cast:
                raise UserError(
                    f"'{key}' is {dtypes[0]} in '{first.path}' but {dtypes[1]} in '{other.path}': say which dtype the "
                    f"mixture is to have (dtype={' or '.join(list(DTYPES)[:3])})"
                )
