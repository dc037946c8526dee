"""Methods of mixing, a file each, found by being in this folder.

A method is a pure function on one tensor of all checkpoints, a stretch of it at a time; of those
that are sums, a pure function that gives the coefficients. One that has to know something of the
whole tensor (an angle, a threshold) says so with `measure`, which may pass over the stretches as
often as it likes before the first one is mixed. So memory does not grow with a tensor.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.registry import Registry

CHUNK = 1 << 19
"""Elements of a stretch: what is computed with them stays in a core's cache, whatever the size of
the tensor."""


@dataclass(frozen=True)
class Stretch:
    """The same elements of one tensor in all checkpoints, in the dtype that is computed in."""

    tensors: Sequence[Tensor]  # [n] each, in the order of the checkpoints
    base: Tensor | None  # [n], of a method that starts from one
    key: str  # the tensor's name, and the place of its first element here: what randomness is drawn for
    start: int

    def deltas(self) -> list[Tensor]:
        """Task vectors: each checkpoint's difference to the base, [n] each."""
        assert self.base is not None
        return [tensor - self.base for tensor in self.tensors]


Weights = Sequence[float]
Options = Mapping[str, Any]
Passes = Callable[[], Iterable[Stretch]]


@dataclass(frozen=True)
class Method:
    """One way of mixing: either the coefficients of a sum, or another function of the tensors.

    Args:
        paper: where it comes from.
        coefficients: (weights, options, what `measure` gave) -> of the sum that is the mixture, one
            for each checkpoint and, behind them, the base's.
        mix: (stretch, weights, options, what `measure` gave) -> the mixed stretch. Changes no
            tensor that it is given.
        measure: (passes over the tensor, weights, options) -> what has to be known of the whole
            tensor.
        base: whether it starts from a base model; then weights need not sum to 1.
        count: of checkpoints, if only one number will do.
        weights: (number of checkpoints, options) -> weights that the method chooses itself; others
            are refused.
        options: what it can be told, with what it takes otherwise.
        ranges: of those options that have one: smallest and largest value.
    """

    paper: str
    coefficients: Callable[[Weights, Options, Any], Weights] | None = None
    mix: Callable[[Stretch, Weights, Options, Any], Tensor] | None = None
    measure: Callable[[Passes, Weights, Options], Any] | None = None
    base: bool = False
    count: int | None = None
    weights: Callable[[int, Options], list[float]] | None = None
    options: Mapping[str, float | int | bool] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def draws(self) -> bool:
        """Whether a mixture depends on what is drawn at random."""
        return "seed" in self.options

    def mixed(self, stretch: Stretch, weights: Weights, options: Options, measured: Any) -> Tensor:
        """The mixed stretch. May overwrite the tensors it is given, or be one of them."""
        if self.coefficients is None:
            assert self.mix is not None
            return self.mix(stretch, weights, options, measured)
        tensors = [*stretch.tensors, *([] if stretch.base is None else [stretch.base])]
        return combine_(tensors, self.coefficients(weights, options, measured))


METHODS: Registry[Method] = Registry("mixing method")


def resolve_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the method `name`: those given (None: not given), completed.

    Raises:
        UserError: an option that the method does not have, of another type or outside its range.
    """
    method = METHODS[name]
    options = dict(method.options)
    for key, value in given.items():
        if value is None:
            continue
        if key not in options:
            advice = suggest(key, options) if options else "it has none"
            raise UserError(f"options.{key}: method={name} has no such option: {advice}")
        wanted = type(options[key])
        if isinstance(value, int) and not isinstance(value, bool) and wanted is float:
            value = float(value)
        if type(value) is not wanted or (wanted is float and not math.isfinite(value)):
            raise UserError(f"options.{key}={value!r} must be {_TYPES[wanted]}")
        low, high = method.ranges.get(key, (-math.inf, math.inf))
        if not low <= value <= high:
            raise UserError(f"options.{key}={value} must be between {low:g} and {high:g}")
        options[key] = value
    return options


_TYPES: dict[type, str] = {float: "a number", int: "a whole number", bool: "true or false"}


def combine_(tensors: Sequence[Tensor], coefficients: Weights) -> Tensor:
    """Σ cᵢ·tᵢ of tensors of one shape and floating dtype, in that dtype, in place of the tensors:
    half the traffic.

    Coefficients of 0 take no part (0·∞ is no number, -0 + 0 no -0), and a single one of 1 gives
    that tensor itself. Products are rounded before they are added, so that the order of two does
    not matter; a fused multiply-add's would.
    """
    used = [(tensor, c) for tensor, c in zip(tensors, coefficients, strict=True) if c != 0]
    if not used:
        return tensors[0].zero_()
    if len(used) == 1 and used[0][1] == 1:
        return used[0][0]
    total = used[0][0].mul_(used[0][1])
    for tensor, c in used[1:]:
        total += tensor.mul_(c)
    return total


# Bits of a float32 that a narrower dtype drops, and what they are halfway between two of its
# values. (Of float16 the numbers below 6e-5 drop more of them, which then end in these zeros.)
_HALFWAY = {torch.bfloat16: (0xFFFF, 0x8000), torch.float16: (0x0FFF, 0)}


def round_once(values: Tensor, out: Tensor) -> Tensor:
    """Copy values [n] into `out` [n], rounded to its dtype once, to nearest, ties to even.

    PyTorch takes a float64 to 16 bits by way of float32. Where that first rounding ends halfway
    between two 16-bit numbers, the second one no longer knows on which side the value was. With
    weights such as 0.4 and 0.6 that happens to one element in some hundreds.
    """
    if values.dtype != torch.float64 or out.dtype not in _HALFWAY:
        return out.copy_(values)
    single = values.float()
    mask, half = _HALFWAY[out.dtype]
    # NumPy finds the few places several times faster.
    bits, exact = single.view(torch.int32).numpy(), values.numpy()
    places = np.flatnonzero((bits & mask) == half)
    if len(places):
        there, rounded = exact[places], single.numpy()[places]
        moved = there != rounded
        # One step towards the exact value is on its side of the middle. Bits of a sign and a
        # magnitude.
        steps = np.where(np.abs(there[moved]) > np.abs(rounded[moved]), np.int32(1), np.int32(-1))
        bits[places[moved]] += steps
    return out.copy_(single)


def mix_tensors(
    name: str,
    tensors: Sequence[Tensor],
    weights: Weights,
    base: Tensor | None = None,
    arithmetic: torch.dtype = torch.float64,
    **options: Any,
) -> Tensor:
    """A mixture of whole tensors in memory: computed in `arithmetic`, rounded once."""
    method, chosen = METHODS[name], resolve_options(name, options)
    own = tensors[0].dtype
    dtype = torch.promote_types(own, arithmetic)
    flat = [tensor.reshape(-1) for tensor in tensors]
    start = None if base is None else base.reshape(-1)

    def passes() -> Iterable[Stretch]:
        for begin in range(0, flat[0].numel(), CHUNK):
            models = [tensor[begin : begin + CHUNK].to(dtype, copy=True) for tensor in flat]
            origin = None if start is None else start[begin : begin + CHUNK].to(dtype, copy=True)
            yield Stretch(models, origin, "", begin)

    measured = method.measure(passes, weights, chosen) if method.measure else None
    mixed = torch.empty(flat[0].numel(), dtype=own)
    for stretch in passes():
        round_once(method.mixed(stretch, weights, chosen, measured), mixed[stretch.start : stretch.start + CHUNK])
    return mixed.view(tensors[0].shape)


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
