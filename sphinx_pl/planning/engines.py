"""The memory of a rank under each engine, by the formulas of docs/plan.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.planning.memory import Bytes, Checkpointing, MicroBatches, Peaks, Run
from sphinx_pl.runtime.ranks import count_devices
from sphinx_pl.stages.adamw import CHUNK
from sphinx_pl.utils.errors import UserError, suggest

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


@dataclass(frozen=True)
class Engine:
    """The way in which ranks share a model. The numbers' defaults are DeepSpeed's own."""

    kind: EngineKind
    nodes: int = 1
    per_node: int = 1
    precision: str = "bf16-mixed"
    gpu: bool = True
    frozen: Literal["whole", "sharded"] = "whole"
    offload_optimizer: str | None = None
    """`cpu` or `nvme`."""
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
    """Bytes of an element of ZeRO-3's buckets and gradient partition."""
    bf16_masters: bool = False
    """ZeRO-3's optimizer writes the weights that modules compute with."""
    bf16_moments: bool = False
    """AdamW's moments are bf16 whatever the weights are."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def weight_bytes(self) -> int:
        """Bytes of an element of the weights that are kept."""
        mixed = self.precision == "bf16-mixed" and self.kind == "zero3"  # DeepSpeed has one kind of bf16
        return 2 if (self.precision == "bf16-true" and self.kind != "fsdp2") or mixed else 4

    @property
    def moments_bytes(self) -> int:
        """Bytes of AdamW's two moments of an element.

        They have the dtype of the weights that AdamW works on, or are bf16.
        """
        return 4 if self.bf16_moments else 2 * self.master_bytes

    @property
    def master_bytes(self) -> int:
        """Bytes of an element of the weights that the optimizer works on."""
        if self.kind == "zero3":
            return 2 if self.bf16_masters else 4
        return self.weight_bytes

    @property
    def compute_precision(self) -> str:
        """Lightning's name of the precision in which a micro-batch is computed."""
        if self.kind == "fsdp2" and self.compute:
            return "bf16-true" if self.compute == "bf16" else "32-true"
        if self.kind in ("zero3", "fsdp2") and self.precision.startswith("bf16"):
            return "bf16-true"
        return self.precision

    @classmethod
    def from_trainer(cls, trainer: Mapping[str, Any], choice: str = "") -> Engine:
        """The engine of the resolved section `trainer`, chosen by the option `choice`.

        Raises:
            UserError: no plan can be made for the strategy or the number of devices.
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
        """This engine with the arguments of `Zero3`, or of Lightning's strategy with a `config`."""
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


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model's parameters, and of its modules' in the order in which they are used."""

    trained: int
    frozen: int
    encoders: dict[str, int]
    """The frozen ones'."""
    inputs: tuple[tuple[int, ...], ...]
    """Elements of each own parameter of each module: projections and the embedding."""
    block: tuple[tuple[int, ...], ...]
    ends: tuple[tuple[int, ...], ...]
    layers: int

    @classmethod
    def of(cls, model: Sphinx, layers: int) -> Sizes:
        """The sizes of a model that has `layers` blocks and is otherwise like `model`."""
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
    """Bytes by kind (`LINES`) at the peak of a rank, and the phase of a step in which it falls."""

    lines: Bytes
    phase: str
    host: float
    """Bytes of a node's CPU memory that offloaded tensors take."""

    @property
    def total(self) -> float:
        return sum(self.lines.values())


def states(engine: Engine, sizes: Sizes) -> tuple[dict[str, float], float]:
    """Bytes by kind that a rank holds throughout, and those that its node's CPU holds for it.

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
    """(phase, parameters as (name, elements)) of each module that ZeRO-3 gathers in a step."""

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
    """The most elements that are gathered in each phase, by DeepSpeed's rules for a known order.

    A module's parameters are gathered while it runs, and those of the next ones up to the prefetch
    bucket. They stay if they are used again within `reuse` elements. Small ones stay for ever.
    Parameters that are gathered together lie in a buffer first, so a fetch takes its size twice.
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
    """Bytes by kind that an engine adds to each phase of a step."""
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
        peaks: those of a micro-batch, from `micro_batches`.
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
    """The properties of an engine that decide how a micro-batch uses memory."""
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
