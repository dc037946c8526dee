"""What a run needs before it is queued: memory of each rank, FLOPs, hours, checkpoints, data (`train.py … plan=true`).

Nothing is built, no GPU and no process group is needed. Activations are those of a step simulated on tensors without
storage (`memory.py`); weights, optimizer states, buckets and gathered parameters follow from how each engine keeps
them (docs/plan.md has the formulas).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.planning.flops import TrainingFlops
from sphinx_pl.planning.gpus import find_gpu
from sphinx_pl.planning.memory import (
    MANY_ROWS,
    Bytes,
    Checkpointing,
    MicroBatches,
    Peaks,
    Run,
    Shape,
    built,
    micro_batches,
)
from sphinx_pl.runtime.ranks import count_devices
from sphinx_pl.stages.adamw import CHUNK
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import write_whole

log = logging.getLogger(__name__)

EngineKind = Literal["single", "ddp", "zero3", "fsdp2"]
LINES = (
    "weights",
    "frozen weights",
    "master weights",
    "optimizer",
    "gradients",
    "gathered weights",
    "weights, cast",
    "activations",
    "logits",
    "buckets",
)
"""Kinds of memory, in the order in which they are printed."""
_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
_PROBED = 8
"""The number of global batches that are planned to measure what rows hold."""


@dataclass
class PlanConfig:
    """The section `plan_for`: what a plan assumes.

    `reserve`: share of the GPU's memory for what is no tensor: CUDA's context, NCCL's buffers, fragmentation.
    `images_per_row`, `supervised` (share of positions with a target) and `image_kb` (of an encoded image): null takes
    them from the data where it can be read. `out`: also write the plan to this file, as JSON.
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
class Engine:
    """How ranks share a model. Defaults of the numbers are DeepSpeed's own."""

    kind: EngineKind
    nodes: int = 1
    per_node: int = 1
    precision: str = "bf16-mixed"
    gpu: bool = True
    frozen: Literal["whole", "sharded"] = "whole"
    offload_optimizer: str | None = None
    """To `cpu` or `nvme`."""
    offload_weights: str | None = None
    bucket_view: bool = False
    """DDP: gradients are views of its buckets."""
    compute: str | None = None
    """FSDP2's dtype while it computes: bf16 or fp32."""
    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    reuse: int = 1_000_000_000
    live: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    reduce_bytes: int = 4
    """Of an element of ZeRO-3's buckets and gradient partition."""
    bf16_masters: bool = False
    """ZeRO-3's optimizer writes the weights that modules compute with."""
    bf16_moments: bool = False
    """AdamW's moments are bf16 whatever the weights are."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def weight_bytes(self) -> int:
        """Of an element of the weights that are kept."""
        mixed = self.precision == "bf16-mixed" and self.kind == "zero3"  # DeepSpeed has one kind of bf16
        return 2 if (self.precision == "bf16-true" and self.kind != "fsdp2") or mixed else 4

    @property
    def moments_bytes(self) -> int:
        """Of AdamW's two together, which have the dtype of the weights that it works on or are bf16."""
        return 4 if self.bf16_moments else 2 * self.master_bytes

    @property
    def master_bytes(self) -> int:
        """Of an element of the weights that the optimizer works on."""
        if self.kind == "zero3":
            return 2 if self.bf16_masters else 4
        return self.weight_bytes

    @property
    def compute_precision(self) -> str:
        """Lightning's name for what a micro-batch is computed in."""
        if self.kind == "fsdp2" and self.compute:
            return "bf16-true" if self.compute == "bf16" else "32-true"
        if self.kind in ("zero3", "fsdp2") and self.precision.startswith("bf16"):
            return "bf16-true"
        return self.precision

    @classmethod
    def from_trainer(cls, trainer: Mapping[str, Any], choice: str = "") -> Engine:
        """From the resolved section `trainer` and the name of the option that was chosen for it.

        Raises:
            UserError: a strategy or a number of devices that no plan can be made for.
        """
        strategy = trainer.get("strategy", "auto")
        options: dict[str, Any] = dict(strategy) if isinstance(strategy, Mapping) else {}
        named = str(options.get("_target_", "") if options else strategy).lower()
        devices = trainer.get("devices", 1)
        nodes, per_node = int(trainer.get("num_nodes", 1)), count_devices(devices)
        if per_node is None:
            raise UserError(
                f"plan: trainer.devices={devices} depends on the machine: give the number of devices of a node"
            )
        precision = str(trainer.get("precision", "32-true"))
        precision = {"32": "32-true", "bf16": "bf16-mixed"}.get(precision, precision)
        if precision not in ("32-true", "bf16-true", "bf16-mixed"):
            raise UserError(f"plan: trainer.precision={precision}; known: 32-true, bf16-true, bf16-mixed")
        engine = cls(
            _kind(named, choice, nodes * per_node),
            nodes,
            per_node,
            precision,
            gpu=trainer.get("accelerator", "auto") != "cpu",
        )
        if engine.kind == "fsdp2":
            return replace(engine, frozen=options.get("frozen", "sharded"), compute=options.get("compute_dtype"))
        if engine.kind == "ddp":
            return replace(engine, bucket_view=bool(options.get("gradient_as_bucket_view", False)))
        if engine.kind == "zero3":
            return engine._with_deepspeed(named, options)
        return engine

    def _with_deepspeed(self, named: str, options: Mapping[str, Any]) -> Engine:
        """With the arguments of `Zero3`, or of Lightning's strategy with a `config`."""
        config = options["config"] if isinstance(options.get("config"), Mapping) else {}
        section: Mapping[str, Any] = {**config.get("zero_optimization", {}), **(options.get("zero") or {})}

        def number(name: str, default: int) -> int:
            return int(float(section.get(name, default)))

        def device(key: str, section_key: str) -> str | None:
            value = options.get(key) or section.get(section_key)
            if isinstance(value, Mapping):
                value = value.get("device", "none")
            if value is True or (value is None and named.endswith("offload")):
                value = "cpu"
            return None if value in (None, False, "none") else str(value)

        reduced = options.get("reduce_dtype") or config.get("data_types", {}).get("grad_accum_dtype")
        return replace(
            self,
            frozen=options.get("frozen", "whole"),
            offload_optimizer=device("offload_optimizer", "offload_optimizer"),
            offload_weights=device("offload_parameters", "offload_param"),
            reduce_bucket=number("reduce_bucket_size", self.reduce_bucket),
            prefetch=number("stage3_prefetch_bucket_size", self.prefetch),
            persistence=number("stage3_param_persistence_threshold", 10_000),
            reuse=number("stage3_max_reuse_distance", self.reuse),
            live=number("stage3_max_live_parameters", self.live),
            sub_group=number("sub_group_size", self.sub_group),
            reduce_bytes=self.weight_bytes if reduced is None else 4 if reduced == "fp32" else 2,
            bf16_masters=options.get("masters") == "bf16",
        )


def _kind(named: str, choice: str, ranks: int) -> EngineKind:
    for text in (named, choice.lower()):
        if "deepspeed" in text or "zero" in text:
            return "zero3"
        if "fsdp" in text or "modelparallel" in text:
            return "fsdp2"
        if "ddp" in text:
            return "ddp"
    if named not in ("", "auto", "none") and "singledevice" not in named:
        raise UserError(
            f"plan: no memory model of trainer.strategy={named}; {suggest(named, ['ddp', 'zero3', 'fsdp2'])}"
        )
    return "ddp" if ranks > 1 else "single"


# -- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Parameters that an engine gathers together. `trained`: they have gradients."""

    numel: tuple[int, ...]
    trained: bool
    phases: tuple[str, ...]
    """Those of a step in which it is used, in order."""


@dataclass(frozen=True)
class Sizes:
    """Of a model: parameters, and its modules in the order in which they are used."""

    trained: int
    frozen: int
    encoders: dict[str, int]
    """Frozen ones."""
    inputs: tuple[tuple[int, ...], ...]
    """Numbers of elements of each module's own parameters: projections and the embedding."""
    block: tuple[tuple[int, ...], ...]
    ends: tuple[tuple[int, ...], ...]
    layers: int

    @classmethod
    def of(cls, model: Sphinx, layers: int) -> Sizes:
        """Of a model with `layers` blocks, from one with at least one."""
        frozen_parts = {name for name, trainable, _ in model.trainable_table() if not trainable}
        table = model.part_parameters()
        counts = {name: sum(p.numel() for p in parameters) for name, parameters in table.items()}
        block_total = sum(p.numel() for p in model.decoder.layers[0].parameters())
        counts["decoder"] += (layers - len(model.decoder.layers)) * block_total

        def own(*modules: Any) -> tuple[tuple[int, ...], ...]:
            sizes = (tuple(p.numel() for p in m.parameters(recurse=False)) for root in modules for m in root.modules())
            return tuple(numbers for numbers in sizes if numbers)

        projections = model.vision.projections if model.vision is not None else []
        decoder = model.decoder
        return cls(
            trained=sum(count for name, count in counts.items() if name not in frozen_parts),
            frozen=sum(count for name, count in counts.items() if name in frozen_parts),
            encoders={name: count for name, count in counts.items() if name in frozen_parts},
            inputs=own(*projections, decoder.tok_embeddings),
            block=own(decoder.layers[0]),
            ends=own(decoder.norm, *([decoder.output] if decoder.output is not None else [])),
            layers=layers,
        )

    @property
    def block_numel(self) -> int:
        return sum(sum(numbers) for numbers in self.block)

    @property
    def root_numel(self) -> int:
        """Parameters outside of the blocks and of frozen encoders."""
        return sum(sum(numbers) for numbers in (*self.inputs, *self.ends))


@dataclass(frozen=True)
class Memory:
    """Bytes by kind (`LINES`) at the peak of a rank, and on which phase of a step it falls."""

    lines: Bytes
    phase: str
    host: float
    """Of a node's CPU memory, by what is offloaded."""

    @property
    def total(self) -> float:
        return sum(self.lines.values())


def states(engine: Engine, sizes: Sizes) -> tuple[dict[str, float], float]:
    """What a rank holds throughout, bytes by kind, and what its node's CPU holds for it.

    Gradients of a single device and of DDP are not among them: they come and go with a step.
    """
    lines: dict[str, float] = {}
    host = 0.0
    weight, trained, frozen = engine.weight_bytes, sizes.trained, sizes.frozen
    if engine.kind in ("single", "ddp"):
        lines["weights"] = weight * trained
        lines["frozen weights"] = weight * frozen
        lines["optimizer"] = engine.moments_bytes * trained
        if engine.kind == "ddp":
            lines["buckets"] = weight * trained
        return lines, host
    share = trained / engine.ranks
    # Whole ones are there beside this rank's part of them under ZeRO-3; FSDP2 does not manage them.
    parts = frozen / engine.ranks
    if engine.kind == "fsdp2":
        compute = 2 if engine.compute_precision == "bf16-true" else 4
        lines["frozen weights"] = 4 * parts if engine.frozen == "sharded" else compute * frozen
        lines["weights"], lines["optimizer"], lines["gradients"] = 4 * share, engine.moments_bytes * share, 4 * share
        return lines, host
    lines["frozen weights"] = weight * (parts if engine.frozen == "sharded" else parts + frozen)
    gradient = engine.reduce_bytes
    lines["buckets"] = gradient * engine.reduce_bucket
    if engine.offload_weights:
        host += weight * share if engine.offload_weights == "cpu" else 0
    else:
        lines["weights"] = weight * share
    if engine.offload_optimizer:
        # The gradient partition, and a float32 copy of it for the update.
        host += (gradient + (8 + engine.moments_bytes if engine.offload_optimizer == "cpu" else 4)) * share
    else:
        lines["optimizer"], lines["gradients"] = engine.moments_bytes * share, gradient * share
        lines["master weights"] = 4 * share if engine.master_bytes > weight or engine.offload_weights else 0
    return lines, host


def _zero3_trace(engine: Engine, sizes: Sizes, checkpointing: Checkpointing) -> Iterator[tuple[str, list[Any]]]:
    """(phase, parameters as (name, elements)) of every module that ZeRO-3 gathers, in the order of a step."""

    def named(group: str, modules: tuple[tuple[int, ...], ...]) -> list[list[Any]]:
        return [[((group, i, j), n) for j, n in enumerate(numbers)] for i, numbers in enumerate(modules)]

    place = ["first", *["middle"] * (sizes.layers - 2), "last"][: sizes.layers]
    blocks = [named(f"block {i}", sizes.block) for i in range(sizes.layers)]
    inputs, ends = named("inputs", sizes.inputs), named("ends", sizes.ends)
    if engine.frozen == "sharded":
        # Module by module; no part of an encoder is larger than a few of a block's matrices.
        yield from (("vision", [((name, 0, 0), min(total, engine.prefetch))]) for name, total in sizes.encoders.items())
    yield from (("vision", module) for module in inputs)
    for i, block in enumerate(blocks):
        yield from ((f"forward {place[i]}", module) for module in block)
    yield from (("head", module) for module in ends)
    yield from (("head", module) for module in reversed(ends))
    for i in range(sizes.layers - 1, -1, -1):
        if checkpointing == "full" or (checkpointing == "selective" and i % 2 == 0):
            yield from ((f"backward {place[i]}", module) for module in blocks[i])
        yield from ((f"backward {place[i]}", module) for module in reversed(blocks[i]))
    yield from (("backward inputs", module) for module in reversed(inputs))


def gathered_by_zero3(engine: Engine, sizes: Sizes, checkpointing: Checkpointing) -> dict[str, float]:
    """Elements that are gathered at most in each phase: DeepSpeed's rules once it knows the order of modules.

    A module's parameters are there while it runs, and those of the next ones up to the prefetch bucket; they stay if
    they are used again within `reuse` elements. Small ones stay for ever. What is gathered together lies in a buffer
    before it is taken apart, so that a fetch takes its size twice.
    """
    trace = list(_zero3_trace(engine, sizes, checkpointing))
    everything = {key: numel for _, module in trace for key, numel in module}
    persistent = {key for key, numel in everything.items() if numel <= engine.persistence}
    available = set(persistent)
    peaks: dict[str, float] = {}
    queued = 0  # place in the trace up to which parameters have been fetched
    live = sum(everything[key] for key in available)
    for step, (phase, module) in enumerate(trace):
        fetched = [(key, numel) for key, numel in module if key not in available]
        available.update(key for key, _ in fetched)
        live += sum(numel for _, numel in fetched)
        fetch = sum(numel for _, numel in fetched)
        queued = max(queued, step + 1)
        ahead, room = 0, min(engine.live - live, engine.prefetch)
        while queued < len(trace) and ahead < room:
            for key, numel in trace[queued][1]:
                if key not in available:
                    available.add(key)
                    live += numel
                    ahead += numel
            queued += 1
        peaks[phase] = max(peaks.get(phase, 0.0), float(live + max(ahead, fetch if len(fetched) > 1 else 0)))
        needed = {key for _, later in trace[step + 1 : queued] for key, _ in later}
        passed = 0
        for _, later in trace[step + 1 :]:
            if passed >= engine.reuse:
                break
            needed.update(key for key, _ in later)
            passed += sum(numel for _, numel in later)
        for key, numel in module:
            if key not in needed and key not in persistent and key in available:
                available.remove(key)
                live -= numel
    return peaks


def extras(engine: Engine, sizes: Sizes, checkpointing: Checkpointing) -> dict[str, Counter[str]]:
    """What an engine adds to each phase of a step, bytes by kind."""
    added: dict[str, Counter[str]] = {}

    def add(phase: str, kind: str, amount: float) -> None:
        added.setdefault(phase, Counter())[kind] += int(amount)

    if engine.kind == "zero3":
        weight = engine.weight_bytes
        for phase, numel in gathered_by_zero3(engine, sizes, checkpointing).items():
            add(phase, "gathered weights", weight * numel)
        # A full bucket is rearranged by ranks before it is scattered.
        for phase in ("head", "backward last", "backward middle", "backward first", "backward inputs"):
            add(phase, "buckets", engine.reduce_bytes * min(engine.reduce_bucket, sizes.trained))
        if not engine.offload_optimizer:  # a sub-group's gradients in one piece, in float32
            part = min(engine.sub_group, sizes.trained / engine.ranks)
            if engine.bf16_moments:  # of a chunk in float32
                add("step", "optimizer", 20 * min(CHUNK, sizes.trained / engine.ranks))
            add("step", "gradients", (4 if engine.reduce_bytes == 4 else 6 if not engine.bf16_masters else 2) * part)
    if engine.kind == "fsdp2":
        compute = 2 if engine.compute_precision == "bf16-true" else 4
        block, root = compute * sizes.block_numel, compute * sizes.root_numel
        encoder = max(sizes.encoders.values(), default=0) * compute if engine.frozen == "sharded" else 0
        ahead = 2 if engine.gpu else 1  # on a GPU the next block's buffer is filled meanwhile
        add("vision", "gathered weights", root + 2 * encoder)
        add("head", "gathered weights", root + ahead * block)
        for place in ("first", "middle", "last"):
            add(f"forward {place}", "gathered weights", root + (1 + ahead) * block)
            add(f"backward {place}", "gathered weights", root + (1 + ahead) * block)
        add("backward inputs", "gathered weights", root + block)
    return added


def peak(engine: Engine, sizes: Sizes, peaks: Peaks, checkpointing: Checkpointing) -> Memory:
    """The peak over the phases of a step.

    Args:
        peaks: of a micro-batch, from `micro_batches`.
    """
    constant, host = states(engine, sizes)
    added = extras(engine, sizes, checkpointing)
    if engine.kind == "ddp" and engine.bucket_view:
        constant["buckets"] = 0  # the gradients are the buckets
    # The optimizer's step: what a micro-batch made is gone, gradients are there.
    if engine.kind in ("single", "ddp"):
        added.setdefault("step", Counter())["gradients"] = engine.weight_bytes * sizes.trained
    best: tuple[float, str, Counter[str]] | None = None
    for phase in dict.fromkeys((*peaks, *added)):
        lines = Counter({kind: int(amount) for kind, amount in constant.items()})
        lines.update({kind: int(amount) for kind, amount in added.get(phase, {}).items()})
        lines.update({kind: int(amount) for kind, amount in peaks.get(phase, {}).items() if phase != "step"})
        if best is None or lines.total() > best[0]:
            best = lines.total(), phase, lines
    assert best is not None
    return Memory({kind: float(best[2][kind]) for kind in LINES if best[2][kind]}, best[1], host * engine.per_node)


def run_of(engine: Engine, train_parts: tuple[str, ...], checkpointing: Checkpointing, accumulate: int) -> Run:
    """What `micro_batches` has to know of an engine."""
    sharded = engine.kind in ("zero3", "fsdp2")
    return Run(
        train_parts,
        engine.compute_precision,
        checkpointing,
        gpu=engine.gpu,
        gradients="reduced" if sharded else "kept",
        accumulate=accumulate > 1 or engine.bucket_view,
        units=engine.kind == "fsdp2",
    )


def largest_rows(engine: Engine, sizes: Sizes, steps: MicroBatches, checkpointing: Checkpointing, room: float) -> int:
    """The most rows of a micro-batch whose peak is at most `room` bytes; 0 if not even one."""

    def fits(rows: int) -> bool:
        return peak(engine, sizes, steps.peaks(rows), checkpointing).total <= room

    low, high = 0, 1
    while high <= 4096 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What rows hold, on average; the most images of a micro-batch decide its memory."""

    tokens: float
    pairs: float
    """Pairs of positions that attention compares."""
    supervised: float
    images: float
    most_images: float
    image_bytes: float
    epoch_tokens: float | None
    """Of everything once."""
    source: str
    """`measured`, or `assumed: why`."""


def rows_of(cfg: DictConfig, model: SphinxConfig, assumed: PlanConfig) -> Rows:
    """From the training mixture if it can be read, else assumptions; keys of `plan_for` go first.

    Without data the rows are full, hold as many images as fit with 80 tokens of text each, and half of the other
    positions are supervised; an encoded image has 50 kB. That is on the safe side for memory. Attention then compares
    what lies within samples of equal length, one for each image.
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
    """Plans a few steps and looks into their samples; no image is decoded."""
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


# -- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Everything that is printed. Bytes and seconds, of a rank or of all ranks as named."""

    model: str
    engine: Engine
    checkpointing: Checkpointing
    gpu: str
    gpu_bytes: float
    """Of its memory, what tensors may take."""
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
    """Of a training checkpoint: the optimizer's weights and moments of what trains, and the frozen parts."""
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
        UserError: what no plan can be made for.
    """
    from sphinx_pl.utils.config import build

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
    """What `Engine.from_trainer` reads, resolved. (Other keys depend on Hydra's run.)"""
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
    """What would make a run fit that does not, each by itself; where nothing does, all of it together."""
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


# -- printing ---------------------------------------------------------------------------------------------------------


def tables(plan: Plan) -> list[Table]:
    """The plan as it is printed."""
    engine = plan.engine
    sharing = f"{engine.kind} on {engine.nodes} * {engine.per_node} ranks, {engine.precision}"
    device = plan.gpu if engine.gpu else "the CPU"
    memory = Table(
        title=f"{plan.model}, {sharing}, checkpointing {plan.checkpointing}: memory of a rank",
        caption=f"The peak falls on the phase: {plan.memory.phase}.",
    )
    memory.add_column("of")
    memory.add_column("GiB", justify="right")
    for kind, amount in plan.memory.lines.items():
        memory.add_row(_NAMES.get(kind, kind), f"{amount / 2**30:,.2f}")
    memory.add_section()
    memory.add_row("peak", f"{plan.memory.total / 2**30:,.2f}")
    if engine.gpu:
        memory.add_row(f"what a {device} has for it", f"{plan.gpu_bytes / 2**30:,.2f}")
    if plan.memory.host:
        memory.add_row("offloaded, in a node's CPU memory", f"{plan.memory.host / 2**30:,.2f}")
    work = Table(title="The run", show_header=False)
    work.add_column("of")
    work.add_column("", justify="right")
    work.add_column("", overflow="fold")
    epoch = plan.steps_per_epoch
    step_rows = plan.rows * plan.accumulate * engine.ranks
    measured = "measured" if plan.content.source == "measured" else "assumed"
    lines: list[tuple[str, str, str]] = [
        ("parameters", f"{plan.parameters / 1e9:,.2f} * 10^9", f"{plan.trained / 1e9:,.2f} * 10^9 of them train"),
        (
            "rows per micro-batch",
            f"{plan.rows}",
            (f"{plan.largest_rows} fit into a {device}" if plan.largest_rows else f"NOT ONE fits into a {device}")
            if engine.gpu
            else "",
        ),
        ("rows per step", f"{step_rows:,}", f"of {plan.row_length} positions; {plan.accumulate} micro-batches a rank"),
        ("tokens per step", f"{plan.tokens_per_step:,.0f}", measured),
        ("images per step", f"{plan.images_per_step:,.0f}", measured),
        ("steps", f"{plan.steps:,}", f"an epoch has {'an unknown number' if epoch is None else f'{epoch:,.0f}'}"),
        ("FLOPs per step", f"{plan.flops_per_step / 1e15:,.1f} * 10^15", "forward and backward, encoders counted"),
    ]
    if engine.gpu:
        days = f" ({plan.hours / 24:,.1f} days)" if plan.hours > 48 else ""
        lines += [
            (
                "seconds per step",
                f"{plan.seconds_per_step:,.3f}",
                f"at an MFU of {plan.mfu:.0%} of {find_gpu(plan.gpu).flops / 1e12:,.0f} TFLOP/s",
            ),
            ("hours", f"{plan.hours:,.1f}", f"of all steps{days}"),
            (
                "data",
                f"{plan.data_bytes_per_second / 1e6:,.1f} MB/s",
                f"all ranks, {plan.content.image_bytes / 1e3:,.0f} kB an image ({measured})",
            ),
        ]
    lines += [
        ("training checkpoint", f"{plan.checkpoint_bytes / 1e9:,.1f} GB", "weights and moments, frozen parts"),
        ("model", f"{plan.model_bytes / 1e9:,.1f} GB", "weights only, in bf16"),
    ]
    for line in lines:
        work.add_row(*line)
    if plan.content.source != "measured":
        work.caption = f"The data could not be read ({plan.content.source.removeprefix('assumed: ')})."
    return [memory, work]


_NAMES = {
    "master weights": "master weights, float32",
    "optimizer": "optimizer states",
    "weights, cast": "weights cast to bf16",
    "activations": "activations and their gradients",
    "logits": "logits and cross entropy",
    "buckets": "communication buckets",
}


def print_plan(cfg: DictConfig, choice: str = "", console: Console | None = None) -> Plan:
    """Make the plan, print it, and write it where `plan_for.out` says."""
    plan = make_plan(cfg, choice)
    console = console or Console()
    for table in tables(plan):
        console.print(table)
    if plan.engine.gpu and not plan.fits:
        console.print(f"[bold]This does not fit into a {plan.gpu}.[/bold] What would:", highlight=False)
        for way in plan.advice:
            console.print(f"  - {way}", highlight=False, soft_wrap=True)
    if out := cfg.plan_for.get("out"):
        write_whole(Path(out), json.dumps(plan.to_dict(), indent=2) + "\n")
    return plan
