"""The writing of a planned mixture, with its provenance."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

import sphinx_pl
from sphinx_pl.checkpoints.folder import PROVENANCE, write_json
from sphinx_pl.checkpoints.format import Checkpoint
from sphinx_pl.checkpoints.huggingface import HuggingFaceFolder, huggingface_folder, open_model
from sphinx_pl.checkpoints.native import SphinxCheckpoint, check_free
from sphinx_pl.checkpoints.original import OriginalCheckpoint, original_folder
from sphinx_pl.checkpoints.output import OutputFolder
from sphinx_pl.checkpoints.provenance import provenance
from sphinx_pl.checkpoints.tensors import hash_of_hashes, tensor_hash
from sphinx_pl.checkpoints.writer import CheckpointWriter
from sphinx_pl.mixing.methods import METHODS
from sphinx_pl.mixing.mixer import Facts
from sphinx_pl.mixing.plan import MixPlan, MixRecipe, open_models, plan_mixture
from sphinx_pl.mixing.rules import part_of
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import check_folder, finite

log = logging.getLogger(__name__)

LAYOUTS = ("sphinx_pl", "original", "huggingface")
MAX_WORKERS = 16


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
    """All that decides the files' content. A killed run is resumed only if it is the same."""
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
    """Distances and cosines between each two models, by part of the model.

    Models have numbers; the base, if there is one, has the last. Then there are also the cosines
    between the models' differences to it.
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
