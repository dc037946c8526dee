"""The content of rows, measured from the data or assumed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf

from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.planning.gpus import find_gpu
from sphinx_pl.utils.errors import UserError

_PROBED = 8
"""The number of global batches that are planned to measure the content of rows."""


@dataclass
class PlanConfig:
    """The section `plan_for`: the assumptions of a plan. None takes a number from the data.

    Attributes:
        reserve: the share of the GPU's memory for CUDA's context, NCCL's buffers and fragmentation.
        supervised: the share of positions with a target.
        image_kb: the size of an encoded image.
        out: the file to which the plan is also written, as JSON.
    """

    gpu: str = "H100-80GB"
    mfu: float = 0.4
    reserve: float = 0.1
    images_per_row: Optional[float] = None
    supervised: Optional[float] = None
    image_kb: Optional[float] = None
    out: Optional[str] = None

    def __post_init__(self) -> None:
        find_gpu(self.gpu)
        if not 0 < self.mfu <= 1 or not 0 <= self.reserve < 1:
            raise UserError(f"plan_for: mfu={self.mfu} must be above 0, reserve={self.reserve} from 0, both below 1")
        if self.supervised is not None and not 0 < self.supervised <= 1:
            raise UserError(f"plan_for.supervised={self.supervised} is a share: above 0, at most 1")


@dataclass(frozen=True)
class Rows:
    """The mean content of a row. The most images of a micro-batch decide its memory."""

    tokens: float
    pairs: float
    """Pairs of positions that attention compares."""
    supervised: float
    images: float
    most_images: float
    image_bytes: float
    epoch_tokens: float | None
    """Tokens of all sources, each read once."""
    source: str
    """`measured`, or `assumed: why`."""


def rows_of(cfg: DictConfig, model: SphinxConfig, assumed: PlanConfig) -> Rows:
    """The rows of the training mixture if it can be read, else assumed ones.

    Keys of `plan_for` replace both. Assumed rows are full, which is on the safe side for memory.
    They hold as many images as fit with 80 tokens of text each, 50 kB an image. Half of the other
    positions are supervised. The samples have equal lengths and one image each.
    """
    length = int(cfg.data.packing.row_length)
    try:
        rows = _probe(cfg, model)
    except (UserError, OSError) as error:
        per_image = model.tokens_per_image + 80
        images = float(length // per_image) if model.vision else 0.0
        cap = int(cfg.data.packing.get("images_per_row", 0) or 0)
        images = min(images, cap) if cap else images
        supervised = max(1.0, (length - images * model.tokens_per_image) / 2)
        reason = " ".join(str(error).split())
        images = images if assumed.images_per_row is None else assumed.images_per_row
        pairs = length * (length / max(1.0, images) + 1) / 2
        rows = Rows(length, pairs, supervised, images, images, 50e3, None, f"assumed: {reason}")
    if assumed.images_per_row is not None:
        rows = replace(rows, images=assumed.images_per_row, most_images=assumed.images_per_row)
    if assumed.supervised is not None:
        rows = replace(rows, supervised=assumed.supervised * length)
    if assumed.image_kb is not None:
        rows = replace(rows, image_bytes=1e3 * assumed.image_kb)
    return rows


def _probe(cfg: DictConfig, model: SphinxConfig) -> Rows:
    """The rows of a few planned steps. No image is decoded."""
    from sphinx_pl.data.datamodule import DataModule
    from sphinx_pl.data.inspect.table import epoch_tokens, lines

    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    datamodule = DataModule.from_config(values, model)
    datamodule.check(False, 1, 1)
    planner = datamodule.planner()
    rows = datamodule.packing.micro_batch_rows
    batches = [batch.rows for _ in range(_PROBED) for batch in planner.plan()]
    if not batches:
        raise UserError("the training mixture is empty")
    count = len(batches) * rows
    samples = [[sample for row in batch for sample in row] for batch in batches]
    images = [[image for sample in batch for image in sample.images] for batch in samples]
    sizes = [image.size if image.size > 0 else Path(image.path).stat().st_size for batch in images for image in batch]
    return Rows(
        tokens=sum(sample.length for batch in samples for sample in batch) / count,
        pairs=sum(sample.pairs for batch in samples for sample in batch) / count,
        supervised=sum(sample.targets for batch in samples for sample in batch) / count,
        images=sum(map(len, images)) / count,
        most_images=max(map(len, images)) / rows,
        image_bytes=sum(sizes) / max(1, len(sizes)),
        epoch_tokens=epoch_tokens(lines(datamodule)),
        source="measured",
    )
