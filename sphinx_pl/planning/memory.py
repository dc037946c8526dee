"""The memory of a micro-batch, from the code of the model itself.

A step runs on PyTorch's fake tensors, which have shapes but no storage. Each storage that would be
made is counted as long as it would live. The peak of a phase of the step, such as `forward middle`,
is linear in depth and rows, so both are extrapolated.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sphinx_pl.data.schema import Batch
from sphinx_pl.models.attention import gpu_kernels
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError

Bytes = Mapping[str, float]
"""Bytes by kind."""
Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Shape:
    """The shape of a micro-batch on one rank."""

    rows: int
    length: int
    supervised: float
    """Positions with a target in a row."""
    images: float
    """Images in a row."""


@dataclass(frozen=True)
class Run:
    """The properties of a run that decide how a micro-batch uses memory."""

    train_parts: tuple[str, ...]
    precision: str
    """Lightning's name: 32-true, bf16-true or bf16-mixed."""
    checkpointing: Checkpointing = "none"
    gpu: bool = True
    """Whether attention runs in a GPU's kernels, which keep no scores."""
    gradients: Literal["kept", "reduced"] = "kept"
    """`kept`: until the next step's backward pass. `reduced`: freed as soon as a parameter has one,
    as engines do that shard them."""
    accumulate: bool = False
    """Whether gradients of earlier micro-batches are in memory."""
    units: bool = False
    """Whether gradients are reduced block by block (FSDP2), not parameter by parameter."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of living storages that were made while it is active, and each phase's peak."""

    def __init__(
        self,
        parameters: Iterable[Tensor] = (),
        logits: tuple[int, int] | None = None,
        choices: int = 0,
        resized: bool = False,
    ) -> None:
        """
        Args:
            parameters: tensors whose storages do not count.
            logits: the shape of the output head's result. Tensors have no values here, so `nonzero`
                returns as many positions as this shape has rows.
            choices: the number of positions that `nonzero` returns for an expert.
            resized: whether sizes are read again each time, since FSDP2 empties storages it keeps.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "start"
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._logits = logits
        self._choices = choices
        self._resized = resized

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            function is torch.ops.aten.nonzero.default and self._logits
        ):  # how many there are is not known without values
            rows = self._logits[0] if args[0].dim() == 1 else self._choices
            result = torch.empty(rows, args[0].dim(), dtype=torch.int64, device=args[0].device)
        else:
            result = function(*args, **(kwargs or {}))
        copied = function is torch.ops.aten._to_copy.default and self._is_parameter(args[0])
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, "weights, cast" if copied else None)
        self.sample()
        return result

    def _is_parameter(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._parameters

    def _add(self, tensor: Tensor, kind: str | None) -> None:
        if isinstance(tensor, DTensor):  # of which other ranks have the rest
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._parameters:
            return
        logits = tensor.dim() == 2 and tuple(tensor.shape) == self._logits
        kind = kind or ("logits" if logits else "activations")
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key)), size, kind
        self.live[kind] += size

    def _drop(self, key: int) -> None:
        _, size, kind = self._known.pop(key)
        self.live[kind] -= size

    def call(self, tensor: Tensor, kind: str) -> None:
        """Count the tensor's storage as this kind."""
        self._add(tensor, kind)
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            reference, size, before = self._known[key]
            self.live[before] -= size
            self.live[kind] += size
            self._known[key] = reference, size, kind

    def sample(self) -> None:
        """Compare with the phase's peak."""
        if self._resized:
            for key, (reference, size, kind) in list(self._known.items()):
                if (storage := reference()) is not None and (now := storage.nbytes()) != size:
                    self._known[key] = reference, now, kind
                    self.live[kind] += now - size
        if self.live.total() > self.peaks.get(self.phase, Counter()).total():
            self.peaks[self.phase] = self.live.copy()


Peaks = dict[str, Bytes]
"""The most of each phase, by kind, without weights, optimizer states and what an engine adds."""


@dataclass
class MicroBatches:
    """Peaks of micro-batches of any number of rows, in a decoder of any depth.

    They are linear in both. `corners[rows, layers]` are simulated.
    """

    layers: int
    corners: dict[tuple[int, int], Peaks] = field(default_factory=dict)

    def peaks(self, rows: int) -> Peaks:
        """The peaks of a micro-batch of `rows` rows."""
        few, many = sorted({rows for rows, _ in self.corners})
        low, high = (self._deep({n: p for (r, n), p in self.corners.items() if r == side}) for side in (few, many))
        return _along(low, high, (rows - few) / (many - few))

    def _deep(self, sides: dict[int, Peaks]) -> Peaks:
        shallow, deeper = min(sides), max(sides)
        if shallow == deeper:
            return sides[shallow]
        return _along(sides[shallow], sides[deeper], (self.layers - shallow) / (deeper - shallow))


def _along(low: Peaks, high: Peaks, share: float) -> Peaks:
    return {
        phase: {
            kind: max(0.0, low[phase].get(kind, 0) + share * (high[phase].get(kind, 0) - low[phase].get(kind, 0)))
            for kind in {**low[phase], **high[phase]}
        }
        for phase in low
    }


def built(config: SphinxConfig, layers: int | None = None) -> Sphinx:
    """The model on the meta device, with `layers` blocks."""
    if layers is not None:
        config = replace(config, decoder=config.decoder.shallow(layers))
    with torch.device("meta"):
        return Sphinx(config).train()


MANY_ROWS = 256
"""The larger simulated number of rows. Peaks of fewer rows are not underestimated; others may be."""


def micro_batches(config: SphinxConfig, shape: Shape, run: Run) -> MicroBatches:
    """Simulates what is needed to tell `shape.rows` and any other number of rows.

    Raises:
        UserError: `train_parts` names a part that the model has not.
    """
    depth = config.decoder.layers
    shallow = 4 + depth % 2  # every second block may be recomputed
    depths = sorted({min(shallow, depth), min(shallow + 2, depth)})
    simulation = _Simulation(built(config, depths[-1]), run)
    result = MicroBatches(depth)
    for rows in (shape.rows, max(MANY_ROWS, 2 * shape.rows)):
        vision: Bytes | None = None
        for layers in depths:
            peaks = simulation.peaks(replace(shape, rows=rows), layers, vision)
            vision = peaks["vision"]
            result.corners[rows, layers] = peaks
    return result


class _Simulation:
    """Steps of a model whose tensors have shapes only."""

    def __init__(self, model: Sphinx, run: Run) -> None:
        self.run = run
        self.model = model
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        model.freeze([part for part in model.parts() if part not in run.train_parts])
        dtype = torch.bfloat16 if run.precision == "bf16-true" else torch.float32
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = self._fake(parameter.detach().to(dtype))
                    module._parameters[name] = made.setdefault(
                        id(parameter), nn.Parameter(fake, requires_grad=parameter.requires_grad)
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    empty = buffer.to("meta")
                    module._buffers[name] = self._fake(empty.to(dtype) if buffer.is_floating_point() else empty)
        self.layers = list(model.decoder.layers)
        self.dtype = dtype
        self.tracker: LiveBytes | None = None
        model.decoder.checkpointing = run.checkpointing
        for layer in self.layers:
            layer.register_forward_pre_hook(self._before_layer)
            layer.register_forward_hook(self._after_layer)

    def _fake(self, tensor: Tensor) -> Tensor:
        return FakeTensor(self.mode, tensor, torch.device("cpu"))

    # -- phases --

    def _place(self, layer: nn.Module) -> str:
        layers = list(self.model.decoder.layers)
        index = layers.index(layer)
        return "first" if index == 0 else "last" if index == len(layers) - 1 else "middle"

    def _enter(self, phase: str, *_: Any) -> None:
        assert self.tracker is not None
        self.tracker.phase = phase
        self.tracker.sample()

    def _before_layer(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if _in_backward():  # computed again
            return
        place = self._place(layer)
        self._enter(f"forward {place}")
        if place == "first" and inputs[0].requires_grad:
            cast(Any, inputs[0]).register_hook(functools.partial(self._enter, "backward inputs"))

    def _after_layer(self, layer: nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> None:
        if _in_backward():
            return
        place = self._place(layer)
        if outputs[0].requires_grad:
            outputs[0].register_hook(functools.partial(self._enter, f"backward {place}"))  # type: ignore[no-untyped-call]
        if place == "last" or len(self.model.decoder.layers) == 1:
            self._enter("head")

    # -- a step --

    def peaks(self, shape: Shape, layers: int, vision: Bytes | None) -> Peaks:
        """The peaks of a step in a decoder of `layers` blocks.

        Args:
            vision: the peak of the phase `vision` if it is known; frozen encoders then do not run.
        """
        model, run = self.model, self.run
        model.decoder.layers = nn.ModuleList(self.layers[:layers])
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decoder = model.config.decoder
        positions = shape.rows * shape.length
        supervised = max(1, round(shape.rows * shape.supervised))
        choices = positions * decoder.experts_per_token // max(1, decoder.experts)
        parameters = list(model.parameters())
        self.tracker = tracker = LiveBytes(parameters, (supervised, decoder.vocab_size), choices)
        tracker.phase = "vision"
        reducer = _Reducer(model, run, tracker)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.mode)
            stack.enter_context(tracker)
            if run.gpu:
                stack.enter_context(gpu_kernels())
            if vision is not None:
                stack.enter_context(self._without_frozen_encoders())
            batch = self._batch(shape)
            if run.gradients == "kept":
                for parameter in trainable:
                    parameter.grad = torch.empty_like(parameter)
                    tracker.call(parameter.grad, "gradients")
            stack.enter_context(reducer)
            loss = self._loss(batch)
            if run.gradients == "kept" and not run.accumulate:
                for parameter in trainable:  # Lightning does so just before the backward pass
                    parameter.grad = None
            self._enter("head")
            loss.backward()  # type: ignore[no-untyped-call]
            del loss, batch
            self._enter("step")
            reducer.finish()
            for parameter in trainable:
                parameter.grad = None
        peaks: Peaks = {phase: dict(kinds) for phase, kinds in tracker.peaks.items()}
        if vision is not None:
            peaks["vision"] = vision
        self.tracker = None
        return peaks

    def _loss(self, batch: Batch) -> Tensor:
        mixed = self.run.precision == "bf16-mixed"
        # Without the cache of weights, as Lightning does it.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
            losses = self.model.token_losses(batch)
            weights = batch.weights.flatten()[losses.index]
            return (losses.nll * weights).sum() + losses.extra

    @contextlib.contextmanager
    def _without_frozen_encoders(self) -> Iterator[None]:
        vision = self.model.vision
        encoders = vision.encoders if vision is not None else {}
        frozen = [encoder for kind, encoder in encoders.items() if kind not in self.run.train_parts]
        dtype = torch.float32 if self.run.precision == "32-true" else torch.bfloat16
        for encoder in frozen:
            assert vision is not None
            tokens = vision.config.encoder_tokens(encoder.config)

            def stub(views: Tensor, tokens: int = tokens, width: int = encoder.width) -> Tensor:
                return torch.empty(len(views), tokens, width, dtype=dtype)

            encoder.forward = stub  # type: ignore[method-assign]
        try:
            yield
        finally:
            for encoder in frozen:
                del encoder.forward

    def _batch(self, shape: Shape) -> Batch:
        rows, length, config = shape.rows, shape.length, self.model.config.vision
        images = max(1, round(rows * shape.images)) if config else 0
        size = config.image_size if config else 0
        tokens = self.model.config.tokens_per_image
        if images * tokens > rows * length:
            raise UserError(
                f"{images} images of {tokens} tokens do not fit into {rows} rows of {length} positions: lower "
                "plan_for.images_per_row, or raise data.packing.row_length"
            )

        def new(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(*sizes, dtype=dtype)

        return Batch(
            input_ids=new(rows, length),
            labels=new(rows, length),
            weights=new(rows, length, dtype=torch.float32),
            segment_ids=new(rows, length, dtype=torch.int32),
            question_ids=new(rows, length, dtype=torch.int32),
            position_ids=new(rows, length),
            task_ids=new(rows, length, dtype=torch.int32),
            pixels=new(images, 3, size, size, dtype=torch.uint8),
            image_slots=new(images * tokens),
        )


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


class _Reducer:
    """Counts gradients as they are accumulated, and frees those that engines reduce."""

    def __init__(self, model: Sphinx, run: Run, tracker: LiveBytes) -> None:
        self.tracker = tracker
        self.run = run
        self.unit_of: dict[int, int] = {}
        self.waiting: dict[int, list[nn.Parameter]] = {}
        self.left: Counter[int] = Counter()
        for number, unit in enumerate([*model.decoder.layers, model]):
            for parameter in unit.parameters():
                if parameter.requires_grad and id(parameter) not in self.unit_of:
                    self.unit_of[id(parameter)] = number
                    self.left[number] += 1
        self.root = len(model.decoder.layers)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.hooks: list[Any] = []

    def __enter__(self) -> _Reducer:
        for parameter in self.parameters:
            hook = parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            self.hooks.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _arrived(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self.tracker.call(parameter.grad, "gradients")
        self.tracker.sample()
        if self.run.gradients == "kept":
            return
        if not self.run.units:
            parameter.grad = None
            return
        unit = self.unit_of[id(parameter)]
        self.waiting.setdefault(unit, []).append(parameter)
        if unit != self.root and len(self.waiting[unit]) == self.left[unit]:
            self._reduce(unit)

    def _reduce(self, unit: int) -> None:
        """FSDP2 copies a block's gradients into one float32 buffer and scatters it over the ranks."""
        parameters = self.waiting.pop(unit, [])
        size = 4 * sum(parameter.numel() for parameter in parameters)
        self.tracker.live["buckets"] += size
        self.tracker.sample()
        self.tracker.live["buckets"] -= size
        for parameter in parameters:
            parameter.grad = None

    def finish(self) -> None:
        """At the end of the backward pass."""
        if self.run.gradients == "reduced" and self.run.units:
            self._reduce(self.root)
