"""Weight mixing: several checkpoints of one architecture become one (SPHINX, section 3.1: β·θ_real + (1-β)·θ_syn).

Methods are pure functions on tensors; `mix_checkpoints` applies one to whole checkpoints, a tensor at a time, so that
memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_pl.checkpoint.format import Checkpoint, TensorInfo, check_free, compare, differences, write_checkpoint
from sphinx_pl.checkpoint.provenance import hash_file, provenance
from sphinx_pl.errors import UserError
from sphinx_pl.registry import Registry

Method = Callable[[Sequence[Tensor], Sequence[float]], Tensor]

METHODS: Registry[Method] = Registry("mixing method")

_CHUNK = 1 << 20
"""Elements mixed at once: their float64 copies stay in the cache, whatever the size of the tensor."""


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ·tᵢ of tensors of one shape and floating dtype, computed in float64 and rounded to that dtype at the end.

    Holds bit for bit: a weight of 1 among zeros gives back its tensor, equal tensors under weights that sum to 1 give
    themselves, and the order of two inputs does not matter.
    """
    used = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    if not used:
        return torch.zeros_like(tensors[0])
    first, weight = used[0]
    # Adding 0 * t would turn -0 into 0 and an infinite t into NaN; float64 sums of equal float64 tensors are inexact.
    if weight == 1 and len(used) == 1:
        return first.clone()
    if math.isclose(math.fsum(weights), 1, abs_tol=1e-12) and all(same_bits(first, other) for other, _ in used[1:]):
        return first.clone()
    mixed = torch.empty_like(first, memory_format=torch.contiguous_format)
    flat = [(tensor.reshape(-1), weight) for tensor, weight in used]
    for start in range(0, mixed.numel(), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        # Products are rounded before they are added: a fused multiply-add would depend on the order.
        total = flat[0][0][chunk].double() * flat[0][1]
        for tensor, weight in flat[1:]:
            total += tensor[chunk].double() * weight
        mixed.view(-1)[chunk] = total
    return mixed


METHODS.register("linear", linear)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit: distinguishes 0 from -0 and equates NaN with itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def check_weights(weights: Sequence[float], count: int, normalize: bool = False) -> list[float]:
    """Coefficients for `count` checkpoints that sum to 1.

    Raises:
        UserError: another number of them, not finite, or a sum further than 1e-6 from 1 without `normalize`.
    """
    if len(weights) != count:
        raise UserError(f"weights has {len(weights)} numbers for {count} checkpoints: give one per checkpoint")
    total = math.fsum(weights)
    if not math.isfinite(total):
        raise UserError(f"weights={list(weights)} must be finite numbers")
    if normalize and total == 0:
        raise UserError(f"weights={list(weights)} sum to 0 and cannot be normalized")
    if not normalize and abs(total - 1) > 1e-6:
        raise UserError(f"weights={list(weights)} sum to {total:g}, not 1: change them, or set normalize=true")
    return [weight / total for weight in weights] if total != 1 else list(weights)


def check_compatible(checkpoints: Sequence[Checkpoint]) -> None:
    """Whether a mixture of these checkpoints means anything.

    Raises:
        UserError: fewer than two, or another model, prompt format, tokenizer, set of tensors, shape or dtype.
    """
    if len(checkpoints) < 2:
        raise UserError(f"checkpoints has {len(checkpoints)} entries: mixing needs at least two")
    first = checkpoints[0]
    for other in checkpoints[1:]:
        names = f"'{first.path}' and '{other.path}'"
        for section in ("model", "processor"):
            if differing := differences(first.config[section], other.config[section], section):
                raise UserError(
                    f"{names} are not of one {section}: {differing[0]}"
                    + (f" ({len(differing) - 1} more keys differ)" if len(differing) > 1 else "")
                    + ": mix checkpoints that were trained from the same one"
                )
        if hash_file(first.tokenizer_file) != hash_file(other.tokenizer_file):
            raise UserError(f"{names} have different tokenizers: mix checkpoints that share one")
        shapes = [{name: checkpoint.info(name).shape for name in checkpoint} for checkpoint in (first, other)]
        if problem := compare(*shapes):
            raise UserError(f"'{other.path}' does not have the tensors of '{first.path}': {problem}")
        for name in shapes[0]:
            a_dtype, b_dtype = first.info(name).dtype, other.info(name).dtype
            if a_dtype != b_dtype:
                raise UserError(
                    f"'{name}' is {a_dtype} in '{first.path}' but {b_dtype} in '{other.path}': save both alike"
                )


class Mixture:
    """The mixed tensors as `Weights`. Those that are equal in all inputs are copied."""

    def __init__(self, checkpoints: Sequence[Checkpoint], weights: Sequence[float], method: str = "linear") -> None:
        self.checkpoints = checkpoints
        self.weights = weights
        self.mix = METHODS[method]

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoints[0])

    def info(self, name: str) -> TensorInfo:
        return self.checkpoints[0].info(name)

    def tensor(self, name: str) -> Tensor:
        """Mixed in more precision than it is stored in, rounded once.

        Raises:
            UserError: an input (named with its file) or the result is not finite, or an integer tensor differs.
        """
        tensors = []
        for checkpoint in self.checkpoints:
            tensor = checkpoint.tensor(name)
            if tensor.is_floating_point() and not _finite(tensor):
                raise UserError(
                    f"'{name}' in '{checkpoint.path}' holds NaN or infinite values: its training diverged, leave it out"
                )
            tensors.append(tensor)
        if all(same_bits(tensors[0], other) for other in tensors[1:]):
            return tensors[0]
        if not tensors[0].is_floating_point():
            raise UserError(f"'{name}' holds integers that differ between the checkpoints: they cannot be mixed")
        mixed = self.mix(tensors, self.weights)
        if not _finite(mixed):
            raise UserError(f"the mixture of '{name}' overflows {mixed.dtype}: use smaller weights")
        return mixed


def mix_checkpoints(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    out: str | Path,
    *,
    method: str = "linear",
    normalize: bool = False,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Write the mixture of `checkpoints` to the folder `out`, with the first one's name, prompt format and tokenizer.

    Args:
        weights: one coefficient for each checkpoint.
        method: a name in `METHODS`.
        normalize: divide the weights by their sum instead of refusing a sum other than 1.
        config: the composed configuration, for the provenance.

    Raises:
        UserError: `out` exists, or see `check_weights`, `check_compatible` and `Mixture.tensor`.
    """
    out = Path(out)
    check_free(out, overwrite)
    METHODS[method]  # an unknown name is refused before hours of reading
    coefficients = check_weights(weights, len(checkpoints), normalize)
    check_compatible(checkpoints)
    first = checkpoints[0]
    origin = provenance("mix", dict(config) if config else None, [checkpoint.identity() for checkpoint in checkpoints])
    origin["mixing"] = {"method": method, "weights": coefficients}
    return write_checkpoint(
        out,
        Mixture(checkpoints, coefficients, method),
        first.config["model"],
        first.processor,
        first.tokenizer_file,
        origin,
        overwrite=overwrite,
        progress="Mixing" if progress else None,
    )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
