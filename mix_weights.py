"""Mix the weights of several checkpoints into one, and evaluate the path between two. Keys: conf/mix_weights.yaml."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from omegaconf import DictConfig, OmegaConf

from sphinx_pl.checkpoint.format import Checkpoint, check_free, open_checkpoint
from sphinx_pl.checkpoint.mixing import check_compatible, check_weights, mix_checkpoints
from sphinx_pl.cli import entry_point
from sphinx_pl.errors import UserError, suggest
from sphinx_pl.evaluation.device import check_precision, choose_device
from sphinx_pl.typed import pick

if TYPE_CHECKING:
    from sphinx_pl.data.datamodule import DataModule


@dataclass
class MixConfig:
    """The keys of conf/mix_weights.yaml, which explains them, with their types."""

    checkpoints: list[str]
    weights: Optional[list[float]]
    beta: Optional[float]
    normalize: bool
    method: str
    out: Optional[str]
    overwrite: bool
    curve: Optional[int]
    curve_dir: Optional[str]
    curve_sources: Optional[list[str]]
    device: str
    precision: str

    def __post_init__(self) -> None:
        if self.weights is not None and self.beta is not None:
            raise UserError("weights and beta are both given: drop one of them")
        if self.out is None and self.curve is None:
            raise UserError("nothing to do: give out=FOLDER to write a mixture, or curve=11 to evaluate a curve")
        if self.curve is not None and self.curve < 2:
            raise UserError(f"curve={self.curve} must be at least 2, the two ends")
        if self.curve is not None and self.out is None and self.curve_dir is None:
            raise UserError("the curve has no place to go: give curve_dir=FOLDER")
        check_precision(self.precision)

    def coefficients(self) -> list[float]:
        """One for each checkpoint, from `weights` or `beta`.

        Raises:
            UserError: neither is given, or they do not fit the checkpoints.
        """
        if self.beta is not None and len(self.checkpoints) != 2:
            raise UserError(f"beta is for 2 checkpoints, not {len(self.checkpoints)}: give weights=[...] instead")
        if self.beta is not None:
            return check_weights([self.beta, 1 - self.beta], 2)
        if self.weights is None:
            raise UserError("how much of each checkpoint? Give weights=[...], or beta=0.5 for two")
        return check_weights(self.weights, len(self.checkpoints), self.normalize)


def curve_data(options: MixConfig, checkpoints: list[Checkpoint], data: DictConfig) -> DataModule:
    """What the curve is measured on.

    Raises:
        UserError: a source that is not there, not two checkpoints, or no matplotlib to draw with.
    """
    from sphinx_pl.data.datamodule import DataModule
    from sphinx_pl.data.processor import Processor
    from sphinx_pl.evaluation.curve import check_ends

    check_ends(checkpoints)
    if find_spec("matplotlib") is None:
        raise UserError("curve= draws a picture and needs matplotlib: pip install 'sphinx-pl[sample]'")
    first = checkpoints[0]
    values: dict[str, Any] = {
        key: OmegaConf.to_container(data[key], resolve=True) for key in ("val_sources", "packing")
    }
    sources: Any = values["val_sources"]
    for name in options.curve_sources or ():
        if name not in sources:
            raise UserError(f"curve_sources: no held-out source '{name}': {suggest(name, sources)}")
    values["val_sources"] = {name: sources[name] for name in options.curve_sources or sources}
    processor = Processor.from_dict(first.processor, first.tokenizer_file, first.model_config)
    datamodule = DataModule(processor, sources={}, val_samples=data.val_samples, **values)
    datamodule.check()
    return datamodule


def write_mixing_curve(
    options: MixConfig, checkpoints: list[Checkpoint], datamodule: DataModule, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Evaluate and write the curve; returns the content of curve.json."""
    from sphinx_pl.evaluation.curve import mixing_curve, write_curve
    from sphinx_pl.evaluation.losses import held_out_losses
    from sphinx_pl.models.sphinx import Sphinx

    assert options.curve is not None
    # Decoded once for all points; val_samples bounds the memory.
    loaders = {name: list(batches) for name, batches in datamodule.val_loaders().items()}
    model = Sphinx(checkpoints[0].model_config).to(device)
    betas = [index / (options.curve - 1) for index in range(options.curve)]
    points = mixing_curve(
        model, checkpoints, betas, lambda m: held_out_losses(m, loaders, options.precision), options.method
    )
    return write_curve(points, folder)


@entry_point(config_name="mix_weights")
def main(cfg: DictConfig) -> float | None:
    """Returns the lowest mean loss on the curve, if one was asked for."""
    options = pick(MixConfig, cfg)
    device = choose_device(options.device)
    out = Path(options.out) if options.out else None
    weights = options.coefficients() if out else []
    if out is not None:
        check_free(out, options.overwrite)
    checkpoints = [open_checkpoint(path) for path in options.checkpoints]
    check_compatible(checkpoints)
    datamodule = curve_data(options, checkpoints, cfg.data) if options.curve is not None else None
    if out is not None:
        mix_checkpoints(
            checkpoints,
            weights,
            out,
            method=options.method,
            overwrite=options.overwrite,
            config=dataclasses.asdict(options),
        )
        print(f"Mixed checkpoint: {out} (weights {', '.join(f'{weight:g}' for weight in weights)})")
    if datamodule is None:
        return None
    folder = Path(options.curve_dir or options.out or ".")
    content = write_mixing_curve(options, checkpoints, datamodule, folder, device)
    best = content["best"]
    print(
        f"Curve: {folder / 'curve.csv'}. The mean loss is lowest at beta={best['beta']:g}: {best['mean']:.4f}, "
        f"{best['gain']:.4f} below the better end."
    )
    return float(best["mean"])


if __name__ == "__main__":
    main()
