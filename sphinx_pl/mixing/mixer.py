"""One tensor of all checkpoints read, checked, compared and mixed, a stretch at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from sphinx_pl.checkpoints.format import ModelFolder
from sphinx_pl.checkpoints.tensors import Read, TensorInfo, TensorReader, assemble, same_bits
from sphinx_pl.mixing.kernel import KINDS, mix_stretch
from sphinx_pl.mixing.methods import CHUNK, METHODS, Stretch, round_once
from sphinx_pl.mixing.rules import PARTS
from sphinx_pl.utils.errors import UserError

FEW = 5
"""Up to this number of models every two are compared; more are compared with the first only."""


@dataclass
class Facts:
    """Facts of a tensor that were measured while it was mixed.

    Attributes:
        hashes: of its bytes in each model, XXH3 in 128 bits.
        squares: the squared length of it in each model.
        distances: the squared distance between two of them, by their places.
        equal: whether all are equal, bit for bit.
    """

    hashes: list[str]
    squares: list[float]
    distances: dict[tuple[int, int], float]
    equal: bool

    def to_json(self) -> dict[str, Any]:
        distances = [[*pair, value] for pair, value in self.distances.items()]
        return {"hashes": self.hashes, "squares": self.squares, "distances": distances, "equal": self.equal}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        distances = {(int(i), int(j)): float(value) for i, j, value in values["distances"]}
        return cls(list(values["hashes"]), list(values["squares"]), distances, bool(values["equal"]))


class Mixer(TensorReader):
    """The mixed tensors under the models' names.

    Args:
        models: the checkpoints, which have the same tensors.
        base: of methods that start from one.
        method: a name in `METHODS`.
        weights: of each tensor, one for each checkpoint.
        options: of the method, complete.
        arithmetic: dtype in which is computed; that of tensors that are stored in a wider one is
            theirs.
        watch: whether to hash and compare what is read.
    """

    def __init__(
        self,
        models: Sequence[ModelFolder],
        weights: Mapping[str, Sequence[float]],
        method: str = "linear",
        options: Mapping[str, Any] | None = None,
        base: ModelFolder | None = None,
        arithmetic: torch.dtype = torch.float64,
        watch: bool = True,
    ) -> None:
        self.models = [*models] if base is None else [*models, base]
        self.weights = weights
        self.method = METHODS[method]
        self.options = dict(options if options is not None else self.method.options)
        self.base = base
        self.arithmetic = arithmetic
        self.watch = watch
        count = len(self.models)
        reference = 0 if base is None else count - 1
        pairs = [(i, j) for j in range(count) for i in range(j) if count <= FEW or reference in (i, j)]
        self._pairs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        self._measured: dict[str, Any] = {}
        self._facts: dict[str, Facts] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.models[0])

    def info(self, key: str) -> TensorInfo:
        return self.models[0].info(key)

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole mixed tensor, rounded to `dtype`; None: to that in which it is stored."""
        info = self.info(key).cast(dtype)
        return assemble(self.stretches(key, info.dtype), info)

    def facts(self, key: str) -> Any:
        """The facts of a tensor that was read, as JSON."""
        return self._facts[key].to_json()

    def _working(self, key: str) -> torch.dtype:
        """The arithmetic's dtype, or a wider one that the tensor is stored in."""
        dtype = self.arithmetic
        for model in self.models:
            dtype = torch.promote_types(dtype, model.info(key).dtype)
        return dtype

    def stretches(self, key: str, dtype: torch.dtype) -> Generator[Tensor, None, None]:
        """The flattened mixture of one tensor, each stretch valid until the next is asked for.

        Raises:
            UserError: a value that is no finite number (named with its file), integers that differ,
                or a mixture that `dtype` cannot hold. Infinite values that all inputs share are
                copied.
        """
        info, infos = self.info(key), [model.info(key) for model in self.models]
        weights, numbers = list(self.weights[key]), info.dtype.is_floating_point
        # Of a tensor that every rank has whole the same is drawn for each.
        parts = self.models[0].parts(key)
        name = key if key in parts else parts[0]
        measured = self._measure(key, weights)
        coefficients: NDArray[np.float64] | None = None
        if self.method.coefficients is not None and numbers:
            coefficients = np.array(self.method.coefficients(weights, self.options, measured), dtype=np.float64)
        # Convex: no value can lie outside of what the inputs hold.
        convex = coefficients is not None and coefficients.min() >= 0 and coefficients.sum() <= 1 + 1e-12
        convex = convex and all(_fits(other.dtype, dtype) for other in infos)
        # Equal values stay as they are where the coefficients say so; encoders that nobody trained do
        # in any case.
        affine = self.base is not None if coefficients is None else abs(coefficients.sum() - 1) < 1e-6
        alike = affine or (PARTS["encoders"](self.models[0].canonical_name(key)) and self._equal_everywhere(key))
        kinds = {other.dtype for other in infos}
        fused = self.arithmetic == torch.float64 and len(kinds) == 1 and kinds | {dtype} <= KINDS.keys()
        copying = np.eye(1, len(self.models))[0]
        hashes = [xxhash.xxh3_128() for _ in self.models]
        squares, distances, equal = np.zeros(len(self.models)), np.zeros(len(self._pairs)), True
        out = torch.empty(min(CHUNK, info.numel), dtype=dtype if numbers else info.dtype)
        with ExitStack() as stack:
            reads = [stack.enter_context(model.open(key)) for model in self.models]
            for start, raw in _raw(reads, infos):
                if self.watch:
                    for digest, piece in zip(hashes, raw, strict=True):
                        digest.update(piece.view(torch.uint8).numpy().data)
                same = all(same_bits(raw[0], piece) for piece in raw[1:])
                equal = equal and same
                result = out[: raw[0].numel()]
                if not numbers:
                    if not same and sorted(weights) != [*[0.0] * (len(weights) - 1), 1.0]:
                        if len(info.shape) > 1:
                            raise UserError(
                                f"'{key}' holds integers that differ between the checkpoints, as the packed weights of "
                                "quantized models do: mix what they were quantized from"
                            )
                        whose = f"{{match: '{key}', weights: {[1, *[0] * (len(weights) - 1)]}}}"
                        raise UserError(
                            f"'{key}' holds integers that differ between the checkpoints, which have no mixture: say "
                            f"whose to take, with rules=[{whose}]"
                        )
                    result.copy_(raw[0] if same else raw[weights.index(1)])
                    yield result
                    continue
                lengths, apart, masked = np.zeros(len(self.models)), np.zeros(len(self._pairs)), False
                if fused and coefficients is not None and isinstance(raw, Tensor):
                    mix_stretch(raw, copying if same and alike else coefficients, self._pairs, result, lengths, apart)
                else:
                    work = [piece.to(self._working(key), copy=True) for piece in raw]
                    self._compare(work, lengths, apart)
                    if same and alike:
                        result.copy_(raw[0])
                    else:
                        count = len(weights)
                        stretch = Stretch(work[:count], work[count] if self.base is not None else None, name, start)
                        round_once(self.method.mixed(stretch, weights, self.options, measured), result)
                if not (np.isfinite(lengths).all() and np.isfinite(apart).all()):
                    if masked := same and bool(raw[0].isinf().any() and not raw[0].isnan().any()):
                        result.copy_(raw[0])  # such as a causal mask: no training made these values
                    else:
                        self._check_finite(key, raw)
                    lengths, apart = np.zeros(len(self.models)), np.zeros(len(self._pairs))
                    values = [piece.double() for piece in raw]  # huge, or without what is infinite in all
                    self._compare([v.nan_to_num_(posinf=0, neginf=0) for v in values], lengths, apart)
                squares, distances = squares + lengths, distances + apart
                if not convex and not masked and not bool(result.isfinite().all()):
                    wider = ", or dtype=fp32" if dtype.itemsize < 4 else ""
                    raise UserError(f"the mixture of '{key}' overflows {dtype}: use smaller weights{wider}")
                yield result
        if self.watch:
            pairs = {(int(i), int(j)): float(value) for (i, j), value in zip(self._pairs, distances, strict=True)}
            self._facts[key] = Facts([digest.hexdigest() for digest in hashes], squares.tolist(), pairs, equal)

    def _compare(self, work: Sequence[Tensor], squares: NDArray[np.float64], distances: NDArray[np.float64]) -> None:
        """Add the models' squared lengths, and the squared distances of pairs."""
        for i, values in enumerate(work):
            squares[i] += float(torch.dot(values, values))
        for place, (i, j) in enumerate(self._pairs if self.watch else ()):
            apart = work[i] - work[j]
            distances[place] += float(torch.dot(apart, apart))

    def _check_finite(self, key: str, raw: Iterable[Tensor]) -> None:
        for model, values in zip(self.models, raw, strict=True):
            if not bool(values.isfinite().all()):
                raise UserError(
                    f"'{key}' in '{model.file(key)}' holds NaN or infinite values: its training diverged, leave it out"
                )

    def _equal_everywhere(self, key: str) -> bool:
        with ExitStack() as stack:
            reads = [stack.enter_context(model.open(key)) for model in self.models]
            pieces = _raw(reads, [model.info(key) for model in self.models])
            return all(same_bits(raw[0], piece) for _, raw in pieces for piece in raw[1:])

    def _measure(self, key: str, weights: Sequence[float]) -> Any:
        """The method's measurement of the whole tensor that `key` is, or is a part of."""
        if self.method.measure is None or not self.info(key).dtype.is_floating_point:
            return None
        parts = self.models[0].parts(key)
        name = parts[0]
        if name not in self._measured:
            measured = self.method.measure(lambda: self._passes(parts), weights, self.options)
            if len(parts) == 1:
                return measured
            self._measured[name] = measured  # the other parts are mixed with the same
        return self._measured[name]

    def _passes(self, parts: Sequence[str]) -> Iterable[Stretch]:
        for key in parts:
            dtype = self._working(key)
            with ExitStack() as stack:
                reads = [stack.enter_context(model.open(key)) for model in self.models]
                for start, raw in _raw(reads, [model.info(key) for model in self.models]):
                    work = [piece.to(dtype) for piece in raw]
                    yield Stretch(work[:-1], work[-1], key, start) if self.base else Stretch(work, None, key, start)


def _raw(reads: Sequence[Read], infos: Sequence[TensorInfo]) -> Iterator[tuple[int, Tensor | list[Tensor]]]:
    """Stored stretches, valid until the next is asked for; [models, n] if of one dtype."""
    numel = infos[0].numel
    length, dtypes = min(CHUNK, numel), {info.dtype for info in infos}
    together = torch.empty(len(infos), length, dtype=infos[0].dtype)
    buffers = [*together] if len(dtypes) == 1 else [torch.empty(length, dtype=info.dtype) for info in infos]
    for start in range(0, numel, CHUNK):
        count = min(CHUNK, numel - start)
        if count < length:  # the last one: its rows lie together too, which the kernel is compiled for
            together = together.flatten()[: len(infos) * count].view(len(infos), count)
            buffers = [*together] if len(dtypes) == 1 else buffers
        raw = [buffer[:count] for buffer in buffers]
        for read, piece in zip(reads, raw, strict=True):
            read(piece, start)
        yield start, together if len(dtypes) == 1 else raw


def _fits(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether every finite value of one dtype is finite in the other."""
    return bool(
        stored.is_floating_point and dtype.is_floating_point and torch.finfo(stored).max <= torch.finfo(dtype).max
    )
