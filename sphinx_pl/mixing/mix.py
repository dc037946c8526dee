"""From checkpoints and weights to a mixed checkpoint: a plan that is checked and shown, then
carried out.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from rich.console import Group
from rich.text import Text

import sphinx_pl
from sphinx_pl.checkpoints.folder import PROVENANCE, write_json
from sphinx_pl.checkpoints.format import Checkpoint, ModelFolder, with_common_names
from sphinx_pl.checkpoints.huggingface import HuggingFaceFolder, huggingface_folder, open_model
from sphinx_pl.checkpoints.native import SphinxCheckpoint, check_free
from sphinx_pl.checkpoints.original import OriginalCheckpoint, original_folder
from sphinx_pl.checkpoints.output import OutputFolder
from sphinx_pl.checkpoints.provenance import provenance
from sphinx_pl.checkpoints.tensors import compare, hash_of_hashes, tensor_hash
from sphinx_pl.checkpoints.writer import CheckpointWriter
from sphinx_pl.mixing.methods import METHODS, resolve_options
from sphinx_pl.mixing.mixer import Facts, Mixer
from sphinx_pl.mixing.rules import OTHER, RuleRow, part_of, resolve, rules_table
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import check_folder, finite

log = logging.getLogger(__name__)

LAYOUTS = ("sphinx_pl", "original", "huggingface")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ARITHMETIC = {"float32": torch.float32, "float64": torch.float64}
MAX_WORKERS = 16


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


def output_of(plan: MixPlan, layout: str | None, shards: int | None, dtype: torch.dtype | None) -> OutputFolder:
    """The files of the mixture.

    Args:
        layout: one of `LAYOUTS`; None: that of the inputs.
        shards: files of the original's layout; None: as many as the first input has, or one.
        dtype: of floating-point tensors; None: each one's own.

    Raises:
        UserError: the model cannot be written in that layout.
    """
    first = plan.models[0]
    _check_layout(layout)
    if shards is not None and layout != "original":
        raise UserError("shards= is the number of files of the original's layout: give layout=original too")
    if isinstance(first, Checkpoint):
        if layout == "original":
            many = len(first.shards.files) if isinstance(first, OriginalCheckpoint) else 1
            return original_folder(first, shards or many, dtype)
        if layout == "huggingface":
            return huggingface_folder(first, dtype)
    elif layout is not None and first.kind.partition("/")[0] != layout:
        raise UserError(f"layout={layout} needs the checkpoints under our names: open_models(checkpoints, own=False)")
    return first.output(dtype)


def _check_layout(layout: str | None) -> None:
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"layout={layout}: {suggest(layout, LAYOUTS)}")


def needs_our_names(checkpoints: Sequence[str | Path], layout: str | None, shards: int | None) -> bool:
    """Whether the mixture is to be written in another layout than the first input's own.

    Raises:
        UserError: there is no such layout.
    """
    _check_layout(layout)
    if layout is None:
        return False
    kinds = {HuggingFaceFolder: "huggingface", SphinxCheckpoint: "sphinx_pl", OriginalCheckpoint: "original"}
    return kinds.get(type(open_model(checkpoints[0]))) != layout or shards is not None


def mix(
    plan: MixPlan,
    out: str | Path,
    *,
    layout: str | None = None,
    shards: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    config: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    beside: Path | None = None,
    progress: str | None = None,
) -> dict[str, Any]:
    """Write the mixture to the folder `out`; returns what its provenance says of the mixing.

    Args:
        layout, shards, dtype: see `output_of`.
        overwrite: replace a checkpoint that is there.
        workers: threads; None: one for each core.
        config: the composed configuration, for the provenance.
        origin: more for its section "mixing".
        beside: a folder of files that go into the new one too, such as a curve's.
        progress: a word for the progress bar; None shows none.

    Raises:
        UserError: `out` exists, or see `output_of`, `CheckpointWriter.write` and `Mixer.stretches`.
    """
    out = Path(out)
    check_out(out, overwrite, [model.path for model in plan.inputs])
    for note in plan.notes():
        log.warning(note)
    files = output_of(plan, layout, shards, dtype)
    mixer = plan.mixer()
    content: dict[str, Any] = {}

    def finish(folder: Path, facts: dict[str, Any]) -> None:
        by_name = {key: Facts.from_json(fact) for key, fact in facts.items()}
        content.update(_describe(plan, by_name) | dict(origin or {}))
        parents = [
            {
                "path": str(model.path),
                "stage": model.provenance.get("stage"),
                "layout": model.kind,
                "xxh3_128": hash_of_hashes(
                    model, {key: by_name[key].hashes[i] if key in by_name else tensor_hash(model, key) for key in model}
                ),
            }
            for i, model in enumerate(plan.inputs)
        ]
        whole = provenance("mix", dict(config) if config else None, parents) | {"mixing": content}
        write_json(folder / PROVENANCE, finite(whole))
        for file in beside.iterdir() if beside else ():
            shutil.copyfile(file, folder / file.name)

    with _one_thread_each():
        fingerprint = _fingerprint(plan, files)
        writer = CheckpointWriter(
            out,
            files,
            fingerprint=fingerprint,
            workers=workers or _cores(),
            progress=progress,
            overwrite=overwrite,
        )
        writer.write(mixer, mixer.facts, finish)
    return content


def check_out(out: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Raises: UserError: no folder can be made there, or see `check_free`."""
    check_folder(out, "out")
    check_free(out, overwrite, sources, _is_checkpoint)


def _is_checkpoint(path: Path) -> bool:
    try:
        open_model(path)
    except UserError:
        return False
    return True


def _fingerprint(plan: MixPlan, files: OutputFolder) -> dict[str, Any]:
    """What decides the content of each file: a killed run is resumed only if it is the same."""
    weights = repr(sorted(plan.weights.items()))
    return {
        "code": sphinx_pl.__version__,
        "inputs": [
            [str(model.path.absolute()), model.kind]
            + [[f.name, *_version(f)] for f in sorted(model.path.iterdir()) if f.is_file()]
            for model in plan.inputs
        ],
        "method": plan.recipe.method,
        "options": plan.options,
        "arithmetic": plan.recipe.arithmetic,
        "weights": xxhash.xxh3_128_hexdigest(weights.encode()),
        "files": {
            file.name: [[name, str(entry.info.dtype), list(entry.info.shape)] for name, entry in file.entries.items()]
            for file in files.files
        },
    }


def _version(file: Path) -> tuple[int, ...]:
    """Changes with the content.

    A file's time of change, unlike that of its content, cannot be set by who copies it.
    """
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _describe(plan: MixPlan, facts: Mapping[str, Facts]) -> dict[str, Any]:
    """The section "mixing" of the provenance."""
    content: dict[str, Any] = {
        "method": plan.recipe.method,
        "paper": METHODS[plan.recipe.method].paper,
        "options": plan.options,
        "arithmetic": plan.recipe.arithmetic,
        "base": str(plan.base.path) if plan.base else None,
        "rules": [{"tensors": row.label, "weights": list(row.weights), "number": len(row.keys)} for row in plan.rows],
        "parts": compare_parts(plan, facts),
    }
    if len(plan.rows) == 1 and len(plan.rows[0].weights) == 1:
        content["weights"] = list(plan.rows[0].weights[0])
    return content


def compare_parts(plan: MixPlan, facts: Mapping[str, Facts]) -> dict[str, Any]:
    """How far apart the models are, by part of the model: distances and cosines between two, by
    their places.

    The last place is the base's, if there is one; then the cosines of what two models have learned
    since are there too.
    """
    first, groups = plan.models[0], defaultdict(list)
    for key in facts:
        if first.info(key).dtype.is_floating_point and key in first.parts(key):
            groups[part_of(first.canonical_name(key))].append(key)
    parts = {}
    for part, keys in groups.items():
        squares = [math.fsum(facts[key].squares[i] for key in keys) for i in range(len(facts[keys[0]].squares))]
        pairs = list(facts[keys[0]].distances)
        apart = {pair: math.fsum(facts[key].distances[pair] for key in keys) for pair in pairs}
        content = {
            "parameters": sum(first.info(key).numel for key in keys),
            "equal": all(facts[key].equal for key in keys),
            "norms": [math.sqrt(square) for square in squares],
            "distances": [[*pair, math.sqrt(apart[pair])] for pair in pairs],
            "cosines": [[i, j, _cosine(squares[i], squares[j], apart[i, j])] for i, j in pairs],
        }
        if plan.base is not None:
            origin = len(plan.models)
            learned = [(i, j) for i, j in pairs if j < origin]
            content["task_cosines"] = [
                [i, j, _cosine(apart[i, origin], apart[j, origin], apart[i, j])] for i, j in learned
            ]
        parts[part] = content
    return parts


def _cosine(a: float, b: float, between: float) -> float:
    """The cosine between two sides, from all three squared lengths; 1 if one side is 0."""
    return (a + b - between) / (2 * math.sqrt(a * b)) if a * b else 1.0


def _cores() -> int:
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0))))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """PyTorch's own threads would only get in the way of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mix_checkpoints(
    checkpoints: Sequence[str | Path | Checkpoint],
    weights: Sequence[float] | None,
    out: str | Path,
    *,
    base: str | Path | None = None,
    method: str = "linear",
    rules: Sequence[Mapping[str, Any]] = (),
    normalize: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`mix` for scripts: open, plan and write in one call. `options` are the method's."""
    models, start = open_models(checkpoints, base)
    recipe = MixRecipe(weights, method, options, rules, normalize)
    return mix(plan_mixture(models, start, recipe), out, overwrite=overwrite)
