"""A run's needs before it is queued: memory of each rank, FLOPs, hours, checkpoints and data.

Nothing is built, and no GPU or process group is needed. Activations are those of a step that is
simulated on tensors without storage (`memory.py`). Weights, optimizer states, buckets and gathered
parameters follow from the engine (`engines.py`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.planning.engines import Engine, Memory, Sizes, largest_rows, peak, run_of
from sphinx_pl.planning.flops import TrainingFlops
from sphinx_pl.planning.gpus import find_gpu
from sphinx_pl.planning.memory import MANY_ROWS, Checkpointing, MicroBatches, Shape, built, micro_batches
from sphinx_pl.planning.rows import PlanConfig, Rows, rows_of
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError, suggest

_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """Everything that is printed, in bytes and seconds."""

    model: str
    engine: Engine
    checkpointing: Checkpointing
    gpu: str
    gpu_bytes: float
    """The part of its memory that tensors may take."""
    parameters: int
    trained: int
    rows: int
    row_length: int
    accumulate: int
    memory: Memory
    largest_rows: int
    content: Rows
    steps: int
    tokens_per_step: float
    images_per_step: float
    flops_per_step: float
    seconds_per_step: float
    """At the given MFU."""
    mfu: float
    checkpoint_bytes: float
    """The size of a training checkpoint: the optimizer's weights and moments, and frozen parts."""
    model_bytes: float
    """Weights only, in bf16."""
    advice: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu_bytes

    @property
    def steps_per_epoch(self) -> float | None:
        return None if self.content.epoch_tokens is None else self.content.epoch_tokens / self.tokens_per_step

    @property
    def hours(self) -> float:
        return self.steps * self.seconds_per_step / 3600

    @property
    def data_bytes_per_second(self) -> float:
        """Encoded images, and about four bytes for a token of text."""
        text = max(0.0, self.tokens_per_step - self.images_per_step * self._image_tokens)
        return (self.images_per_step * self.content.image_bytes + 4 * text) / self.seconds_per_step

    _image_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("fits", "steps_per_epoch", "hours", "data_bytes_per_second")}
        return dataclasses.asdict(self) | derived | {"memory_total": self.memory.total}


def make_plan(cfg: DictConfig, choice: str = "") -> Plan:
    """The plan of a composed configuration of train.py.

    Args:
        choice: the name of the option chosen for `trainer`.

    Raises:
        UserError: no plan can be made for this configuration.
    """
    assumed = build(PlanConfig, cfg.plan_for, "plan_for")
    gpu = find_gpu(assumed.gpu)
    config = SphinxConfig.from_dict(cfg.model)
    engine = replace(
        Engine.from_trainer(trainer_section(cfg), choice), bf16_moments=cfg.stage.optim.get("moments") == "bf16"
    )
    checkpointing = cast(Checkpointing, str(cfg.stage.get("checkpointing", "none")))
    if checkpointing not in _CHECKPOINTING:
        raise UserError(f"stage.checkpointing={checkpointing}; {suggest(checkpointing, _CHECKPOINTING)}")
    parts = tuple(cfg.stage.train_parts)
    content = rows_of(cfg, config, assumed)
    rows, length, accumulate = (
        int(cfg.data.packing.micro_batch_rows),
        int(cfg.data.packing.row_length),
        int(cfg.stage.accumulate),
    )
    model = built(config, 1)
    unknown = [part for part in parts if part not in model.parts()]
    if unknown:
        raise UserError(
            f"stage.train_parts: no part '{unknown[0]}' in this model; {suggest(unknown[0], model.parts())}"
        )
    model.freeze([part for part in model.parts() if part not in parts])
    sizes = Sizes.of(model, config.decoder.layers)
    shape = Shape(rows, length, content.supervised, content.most_images)
    steps = micro_batches(config, shape, run_of(engine, parts, checkpointing, accumulate))
    memory = peak(engine, sizes, steps.peaks(rows), checkpointing)
    room = gpu.memory * (1 - assumed.reserve)
    largest = largest_rows(engine, sizes, steps, checkpointing, room)
    if largest > max(MANY_ROWS, 2 * rows):  # far from what was simulated
        near = micro_batches(config, replace(shape, rows=largest), run_of(engine, parts, checkpointing, accumulate))
        largest = largest_rows(engine, sizes, near, checkpointing, room)
    model.decoder.config = config.decoder  # FLOPs follow the configuration's depth
    images = content.images * rows if config.vision else 0.0
    work = TrainingFlops(model).of(rows * length, content.pairs * rows, content.supervised * rows, images)
    flops = work * accumulate * engine.ranks
    plan = Plan(
        model=config.name,
        engine=engine,
        checkpointing=checkpointing,
        gpu=assumed.gpu,
        gpu_bytes=room,
        parameters=sizes.trained + sizes.frozen,
        trained=sizes.trained,
        rows=rows,
        row_length=length,
        accumulate=accumulate,
        memory=memory,
        largest_rows=largest,
        content=content,
        steps=int(cfg.trainer.max_steps),
        tokens_per_step=content.tokens * rows * accumulate * engine.ranks,
        images_per_step=images * accumulate * engine.ranks,
        flops_per_step=flops,
        seconds_per_step=flops / (engine.ranks * gpu.flops * assumed.mfu),
        mfu=assumed.mfu,
        checkpoint_bytes=1.0 * (engine.master_bytes + engine.moments_bytes) * sizes.trained
        + engine.weight_bytes * sizes.frozen,
        model_bytes=2.0 * (sizes.trained + sizes.frozen),
        _image_tokens=config.tokens_per_image,
    )
    if plan.fits or not engine.gpu:
        return plan
    return replace(plan, advice=advice(engine, sizes, config, shape, parts, checkpointing, accumulate, steps, room))


_TRAINER_KEYS = ("strategy", "devices", "num_nodes", "precision", "accelerator")


def trainer_section(cfg: DictConfig) -> dict[str, Any]:
    """The resolved keys that `Engine.from_trainer` reads. Other keys depend on Hydra's run."""
    values = {key: cfg.trainer[key] for key in _TRAINER_KEYS if key in cfg.trainer}
    return {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for k, v in values.items()}


def advice(
    engine: Engine,
    sizes: Sizes,
    config: SphinxConfig,
    shape: Shape,
    parts: tuple[str, ...],
    checkpointing: Checkpointing,
    accumulate: int,
    steps: MicroBatches,
    room: float,
) -> list[str]:
    """Changes that each make a run fit, or those that do it together if none does alone."""
    ways: list[str] = []
    if (rows := largest_rows(engine, sizes, steps, checkpointing, room)) > 0:
        more = math.ceil(shape.rows * accumulate / rows)
        ways.append(
            f"data.packing.micro_batch_rows={rows} stage.accumulate={more}: fewer rows in a micro-batch, as many in a "
            "step"
        )
    sharded = engine if engine.kind in ("zero3", "fsdp2") else replace(engine, kind="zero3", precision="bf16-true")
    for kind in _CHECKPOINTING[_CHECKPOINTING.index(checkpointing) + 1 :]:
        less = micro_batches(config, shape, run_of(engine, parts, kind, accumulate))
        if peak(engine, sizes, less.peaks(shape.rows), kind).total <= room:
            ways.append(f"stage.checkpointing={kind}: activations are computed again in the backward pass")
            break
        steps = less if kind == "full" and engine.kind == sharded.kind else steps
    full: Checkpointing = "full"
    if engine.kind != sharded.kind:
        steps = micro_batches(config, shape, run_of(sharded, parts, full, accumulate))
    offloaded = replace(sharded, kind="zero3", offload_optimizer="cpu", offload_weights="cpu", bf16_masters=False)
    for rows in dict.fromkeys((shape.rows, 1)):
        peaks = steps.peaks(rows)
        with_rows = "" if rows == shape.rows else f" data.packing.micro_batch_rows={rows}"
        for factor in (1, 2, 4, 8, 16, 32, 64):
            wider = replace(sharded, nodes=sharded.nodes * factor)
            if (factor > 1 or wider.kind != engine.kind or rows < shape.rows) and (
                peak(wider, sizes, peaks, full).total <= room
            ):
                trainer = "" if wider.kind == engine.kind else " trainer=zero3"
                ways.append(f"{wider.ranks} GPUs with{trainer} stage.checkpointing=full{with_rows}")
                break
        if not engine.offload_optimizer and (away := peak(offloaded, sizes, peaks, full)).total <= room:
            ways.append(
                f"trainer=zero3_offload stage.checkpointing=full{with_rows}, with {away.host / 2**30:,.0f} GiB of CPU "
                "memory in each node"
            )
        if ways:
            return ways
    return [
        f"nothing that is known here: {sizes.trained / 1e9:.1f} * 10^9 trained parameters and a row of {shape.length} "
        "positions need a larger GPU, a shorter data.packing.row_length, or fewer parts in stage.train_parts"
    ]
