"""Mix the weights of several checkpoints into one, and measure whether it helps.

The file conf/mix_weights.yaml explains the keys.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sphinx_pl.checkpoints.format import Checkpoint
from sphinx_pl.checkpoints.torch_shards import ShardsFolder
from sphinx_pl.checkpoints.writer import CheckpointWriter
from sphinx_pl.evaluation.objective import LOSS, SCORE, Measurements, Objective
from sphinx_pl.mixing.methods import METHODS
from sphinx_pl.mixing.mix import check_out, mix, needs_our_names, output_of
from sphinx_pl.mixing.plan import DTYPES, MixPlan, MixRecipe, open_models, plan_mixture
from sphinx_pl.mixing.rules import complement
from sphinx_pl.runtime.device import autocast, choose_device
from sphinx_pl.runtime.hydra_app import entry_point
from sphinx_pl.settings.mix_weights import AUTO, GREEDY, MixConfig, check_mix
from sphinx_pl.utils.config import pick
from sphinx_pl.utils.console import Steps
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import check_folder, finite, write_whole

if TYPE_CHECKING:
    from sphinx_pl.data.schema import Batch
    from sphinx_pl.evaluation.mixtures.evaluator import MixtureEvaluator
    from sphinx_pl.models.sphinx import Sphinx

POINTS = 11
"""The number of points of a curve that beta=auto needs, if curve= does not set it."""
ASKED_AT_ONCE = 32


class Measuring:
    """Measures mixtures: held-out losses, and scores of test questions if tasks are named.

    `steps` shows the progress.

    Raises:
        UserError: a source does not exist, the tokenizer or prompt format or matplotlib is missing,
            or the objective is not measured.
    """

    def __init__(self, options: MixConfig, first: Checkpoint, data: DictConfig, steps: Steps) -> None:
        from sphinx_pl.data.datamodule import DataModule
        from sphinx_pl.data.processor import Processor

        if find_spec("matplotlib") is None:
            raise UserError("curve= draws a picture and needs matplotlib: pip install 'sphinx-pl[sample]'")
        checkpoint = first
        if not checkpoint.processor:
            raise UserError(
                f"'{checkpoint.path}' is a decoder without a prompt format: its losses on data cannot be measured"
            )
        self.options, self.steps = options, steps
        self.processor = Processor.from_dict(checkpoint.processor, checkpoint.tokenizer(), checkpoint.model_config)
        values: dict[str, Any] = {
            key: OmegaConf.to_container(data[key], resolve=True) for key in ("val_sources", "packing") if data.get(key)
        }
        if len(values) < 2:
            raise UserError("data has no val_sources or no packing, which measure mixtures: choose data=")
        sources: Any = values["val_sources"]
        for name in options.curve_sources or ():
            if name not in sources:
                raise UserError(f"curve_sources: there is no held-out source '{name}': {suggest(name, sources)}")
        values["val_sources"] = {name: sources[name] for name in options.curve_sources or sources}
        measured = [f"{LOSS}/{name}" for name in values["val_sources"]]
        Objective(options.objective).names([*measured, *(f"{SCORE}/{task}" for task in options.curve_tasks or ())])
        self.data = DataModule(self.processor, sources={}, val_samples=data.val_samples, **values)
        self.data.check()
        self.records = self._records(data) if options.curve_tasks else []
        message = f"Reading the held-out samples of {', '.join(values['val_sources'])}"
        steps.console.print(message, markup=False, highlight=False, soft_wrap=True)
        # The samples are decoded once for all points; val_samples bounds the memory.
        self.loaders = {name: list(batches) for name, batches in self.data.val_loaders().items()}

    def _records(self, data: DictConfig) -> list[Any]:
        from sphinx_pl.data.records import read_records
        from sphinx_pl.evaluation.runner import select

        test: Any = OmegaConf.to_container(data.get("test") or {}, resolve=True)
        records, _ = read_records(test, "test")
        tasks = {record.task for record in records}
        for task in self.options.curve_tasks or ():
            if task not in tasks:
                raise UserError(f"curve_tasks: data.test has no task '{task}': {suggest(task, tasks)}")
        return select([r for r in records if r.task in (self.options.curve_tasks or ())], self.options.curve_limit)

    def __call__(self, model: Sphinx) -> Measurements:
        import torch

        from sphinx_pl.evaluation.losses import SourceLoss, held_out_losses
        from sphinx_pl.evaluation.runner import evaluate

        batches = sum(map(len, self.loaders.values()))
        units, counter = batches + math.ceil(len(self.records) / ASKED_AT_ONCE), itertools.count()

        def watched(name: str) -> Iterator[Batch]:
            for batch in self.loaders[name]:
                self.steps.within(next(counter) / units, f"held-out loss of {name}")
                yield batch

        losses = held_out_losses(model, {name: watched(name) for name in self.loaders}, self.options.precision)
        measurements: dict[str, SourceLoss] = {f"{LOSS}/{name}": loss for name, loss in losses.items()}
        if self.records:
            device = next(model.parameters()).device
            self.steps.within(batches / units, f"answers to {len(self.records)} questions")
            with torch.no_grad(), autocast(device, self.options.precision):
                predictions = evaluate(model, self.processor, self.records, batch_size=ASKED_AT_ONCE, progress=False)
            for task in dict.fromkeys(prediction.task for prediction in predictions):
                scores = torch.tensor([p.score for p in predictions if p.task == task], dtype=torch.float64)
                measurements[f"{SCORE}/{task}"] = SourceLoss(scores, torch.ones_like(scores))
        return measurements


def _find(
    options: MixConfig, evaluate: MixtureEvaluator, folder: Path, final: Path, steps: Steps
) -> tuple[dict[str, Any], dict[str, Any] | None, float]:
    """Evaluate the requested mixtures, and write the results to `folder`.

    Args:
        final: the folder that the results will finally be in.

    Returns:
        The recipe's keys that were found, their origin for the provenance, and the best value.
    """
    from sphinx_pl.evaluation.mixtures import search
    from sphinx_pl.evaluation.mixtures.curve import describe_best, measure_curve, simplex, write_curve

    objective, count, console = Objective(options.objective), len(evaluate.plan.models), steps.console
    keys: dict[str, Any] = {}
    origin: dict[str, Any] | None = None
    value, start = float("nan"), 0.5
    if options.curve is not None or options.beta == AUTO:
        points_per_edge = options.curve or POINTS
        with steps.of("Mixing curve", len(simplex(count, points_per_edge))):
            points = measure_curve(evaluate, points_per_edge)
        content = write_curve(points, folder, objective, options.method)
        value, why = content["best"]["value"], describe_best(content)
        console.print(f"Curve: {final / 'curve.csv'}. {why}", markup=False, highlight=False)
        start = content["best"].get("beta", start)
        if options.beta == AUTO:
            keys = {"weights": content["best"]["weights"]}
            origin = {"chosen_by": {"objective": options.objective, "curve": len(points), "why": why}}
    if options.search is not None:
        with steps.of("Search", options.budget):
            trials, best = search.search_parts(
                evaluate,
                options.search,
                options.budget,
                objective,
                start,
                lambda trial: console.print(
                    "  ".join(f"{part} {beta:.3g}" for part, beta in trial.betas.items())
                    + f": {objective.value(trial.measurements):.4f}",
                    markup=False,
                    highlight=False,
                ),
            )
        content = search.write_search(trials, best, objective, folder)
        value, betas, why = content["value"], dict(content["betas"]), search.describe_search(content)
        console.print(f"Search: {final / 'search.csv'}, {len(trials)} mixtures. {why}.", markup=False, highlight=False)
        rest = betas.pop(search.REST, start)
        rules = [{"match": part, "beta": beta} for part, beta in betas.items()]
        keys = {"weights": [rest, complement(rest)], "rules": rules}
        origin = {"chosen_by": {"objective": options.objective, "search": len(trials), "why": why}}
    if options.method == GREEDY:
        soup_trials: list[dict[str, Any]] = []

        def tell(models: list[int], at: float, kept: bool) -> None:
            soup_trials.append({"checkpoints": models, "value": at, "kept": kept})
            names = ", ".join(str(evaluate.plan.models[model].path) for model in models)
            line = f"{names}: {options.objective} {at:.4f}" + (" (kept)" if kept else "")
            console.print(line, markup=False, highlight=False)

        with steps.of("Greedy soup", 2 * count - 1):
            soup = search.greedy_soup(evaluate, objective, tell)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"objective": options.objective, "soup": soup, "tried": soup_trials}
        write_whole(folder / "soup.json", json.dumps(finite(content), indent=2) + "\n")
        value = next(trial["value"] for trial in reversed(soup_trials) if trial["kept"])
        keys = {"weights": search.soup_weights(soup, count)}
        origin = {"chosen_by": {"objective": options.objective, "soup": soup}}
    return keys, origin, value


def summarise(mixing: dict[str, Any], out: Path, seconds: float, console: Console) -> None:
    """Print how far apart the mixed models are, part by part."""
    from sphinx_pl.mixing.show import distances_table

    console.print(distances_table(mixing))
    weights = f" (weights {', '.join(f'{weight:g}' for weight in mixing['weights'])})" if "weights" in mixing else ""
    console.print(f"Mixed checkpoint: {out}{weights}, in {seconds:.1f} s", markup=False, highlight=False)


def _measured_in(folder: Path) -> Path | None:
    """Return the file of an earlier evaluation in this folder, or None."""
    files = (folder / name for name in ("curve.json", "search.json", "soup.json"))
    return next((file for file in files if file.exists()), None)


def _plan(options: MixConfig, paths: Sequence[str], recipe: MixRecipe, own: bool) -> MixPlan:
    models, base = open_models(paths, options.base, own)
    return plan_mixture(models, base, recipe, cast=options.dtype is not None)


@entry_point(config_name="mix_weights", check=check_mix)
def main(cfg: DictConfig) -> float | None:
    """Return the objective's best value, if mixtures were evaluated."""
    options, console = pick(MixConfig, cfg, ["data"]), Console()
    device = choose_device(options.device)
    out = Path(options.out) if options.out else None
    paths = options.paths()
    recipe = options.recipe(len(paths))
    if out is not None:
        check_out(out, options.overwrite, [Path(path) for path in (*paths, options.base) if path is not None])
    if options.curve_dir is not None:
        check_folder(Path(options.curve_dir), "curve_dir")
        if not options.overwrite and (earlier := _measured_in(Path(options.curve_dir))):
            raise UserError(f"'{earlier}' exists: choose another curve_dir, or overwrite=true")
    layout = options.layout
    own = not needs_our_names(paths, layout, options.shards)
    plan = _plan(options, paths, recipe, own)
    if options.measures and METHODS[options.method].draws and isinstance(plan.models[0], ShardsFolder):
        # Random methods draw per tensor, and ranks hold parts of tensors. So the mixture is written
        # from the whole tensors that are evaluated.
        own, layout = False, "original"
        plan = _plan(options, paths, recipe, own)
    dtype = DTYPES[options.dtype] if options.dtype else None
    if out is not None:
        files = output_of(plan, layout, options.shards, dtype)
        CheckpointWriter(out, files).check()
        if layout == "huggingface" and (omitted := len(set(plan.models[0]) - files.names)):
            console.print(
                f"Note: layout=huggingface holds a language model: {omitted} tensors of encoders and projections are "
                "omitted"
            )
    value, origin, beside = None, None, None
    if options.measures:
        from sphinx_pl.evaluation.mixtures.curve import simplex
        from sphinx_pl.evaluation.mixtures.evaluator import MixtureEvaluator
        from sphinx_pl.evaluation.mixtures.search import FEWEST, groups_of

        if options.curve is not None or options.beta == AUTO:
            simplex(len(paths), options.curve or POINTS)
        renamed_plan = _plan(options, paths, recipe, own=False)
        first = renamed_plan.models[0]
        assert isinstance(first, Checkpoint)
        if options.search is not None:
            groups_of(renamed_plan, options.search, options.budget)
            if (samples := cfg.data.val_samples) and samples < FEWEST:
                raise UserError(f"search= needs data.val_samples={FEWEST} at least, and it is {samples}")
        steps = Steps(console)
        evaluate = MixtureEvaluator(renamed_plan, Measuring(options, first, cfg.data, steps), device, dtype, steps)
        if options.curve_dir or out is None:
            folder = Path(options.curve_dir or ".")
        else:  # kept if a later step fails, since it may have taken long
            folder = beside = out.with_name(f".{out.name}.curve")
            shutil.rmtree(folder, ignore_errors=True)
        changes, origin, value = _find(options, evaluate, folder, out if beside and out else folder, steps)
        if changes:
            plan = _plan(options, paths, dataclasses.replace(recipe, **changes), own)
        del evaluate
    if out is None:
        return value
    console.print(plan.table())
    begin = time.monotonic()
    mixing = mix(
        plan,
        out,
        layout=layout,
        shards=options.shards,
        dtype=dtype,
        overwrite=options.overwrite,
        workers=options.workers,
        config=dataclasses.asdict(options),
        origin=origin,
        beside=beside,
        progress="Mixing",
    )
    if beside is not None:
        shutil.rmtree(beside)
    summarise(mixing, out, time.monotonic() - begin, console)
    return value


if __name__ == "__main__":
    main()
