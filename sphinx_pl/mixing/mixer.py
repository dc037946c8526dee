"""One tensor of all checkpoints read, checked, compared and mixed, a stretch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from sphinx_pl.checkpoint.format import TensorInfo
from sphinx_pl.checkpoint.layout import assemble
from sphinx_pl.checkpoint.stored import Read, Stored
from sphinx_pl.errors import UserError
from sphinx_pl.mixing.methods import CHUNK, METHODS, Stretch
from sphinx_pl.mixing.rules import PARTS

FEW = 3
"""Up to so many models every two are compared; of more, each with the first only."""


@dataclass
class Facts:
    """What is known of a tensor when it was mixed.

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


class Mixer:
    """The mixed tensors, as `Values` for files and whole for the memory.

    Args:
        models: the checkpoints, which have the same tensors.
        base: of methods that start from one.
        method: a name in `METHODS`.
        weights: of each tensor, one for each checkpoint.
        options: of the method, complete.
        arithmetic: dtype in which is computed; that of tensors that are stored in a wider one is theirs.
        watch: whether to hash and compare what is read.
    """

    def __init__(
        self,
        models: Sequence[Stored],
        weights: Mapping[str, Sequence[float]],
        method: str = "linear",
        options: Mapping[str, Any] | None = None,
        base: Stored | None = None,
        arithmetic: torch.dtype = torch.float32,
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
        self._pairs = [
            (i, j) for j in range(count) for i in range(j) if count <= FEW or i == reference or j == reference
        ]
        self._measured: dict[str, Any] = {}
        self._facts: dict[str, Facts] = {}

    def info(self, key: str) -> TensorInfo:
        return self.models[0].info(key)

    def tensor(self, key: str) -> Tensor:
        """The whole mixed tensor, in the dtype in which it is stored."""
        info = self.info(key)
        return assemble(self.stretches(key, info.dtype), info)

    def facts(self, key: str) -> Any:
        return self._facts[key].to_json()

    def _working(self, key: str) -> torch.dtype:
        """Dtype that the tensor is computed in: the arithmetic's, or a wider one that it is stored in."""
        dtype = self.arithmetic
        for model in self.models:
            dtype = torch.promote_types(dtype, model.info(key).dtype)
        return dtype

    def stretches(self, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The flattened mixture of one tensor, each stretch valid until the next is asked for.

        Raises:
            UserError: a value that is no finite number (named with its file), integers that differ, or a mixture that
                `dtype` cannot hold.
        """
        info = self.info(key)
        weights = list(self.weights[key])
        hashes = [xxhash.xxh3_128() for _ in self.models]
        squares, distances, equal = [0.0] * len(self.models), dict.fromkeys(self._pairs, 0.0), True
        length = min(CHUNK, info.numel)
        out = torch.empty(length, dtype=dtype if info.dtype.is_floating_point else info.dtype)
        # Of the arithmetic's dtype: each model's values, and a difference of two.
        working = self._working(key) if info.dtype.is_floating_point else info.dtype
        scratch = torch.empty(len(self.models) + 1, length, dtype=working)
        # Of a tensor that every rank has whole the same is drawn for each.
        parts = self.models[0].parts(key)
        name = key if key in parts else parts[0]
        measured = self._measure(key, weights)
        # Slerp's coefficients are other ones than the weights, and sum to more.
        coefficients = measured if self.base is None and measured is not None else weights
        # Convex: no value can lie outside of what the inputs hold.
        convex = self.base is None and min(coefficients) >= 0 and math.fsum(coefficients) <= 1 + 1e-6
        convex = convex and all(_fits(model.info(key).dtype, dtype) for model in self.models)
        # Towers that nobody trained are to stay what they are even where weights don't sum to 1.
        alike = self.base is not None or abs(math.fsum(coefficients) - 1) < 1e-6
        alike = alike or PARTS["towers"](self.models[0].ours(key))
        with ExitStack() as stack:
            reads = [stack.enter_context(model.reader(key)) for model in self.models]
            for start, raw in _raw(reads, [model.info(key) for model in self.models]):
                if self.watch:
                    for digest, piece in zip(hashes, raw, strict=True):
                        digest.update(piece.view(torch.uint8).numpy().data)
                same = all(_equal(raw[0], piece) for piece in raw[1:])
                equal = equal and same
                result = out[: len(raw[0])]
                if not info.dtype.is_floating_point:
                    if not same:
                        raise UserError(f"'{key}' holds integers that differ between the checkpoints: leave one out")
                    result.copy_(raw[0])
                    yield result
                    continue
                work = [scratch[i][: len(piece)].copy_(piece) for i, piece in enumerate(raw[:1] if same else raw)]
                lengths = [self._square(key, i, value) for i, value in enumerate(work)]
                if same:
                    work, lengths = work * len(raw), lengths * len(raw)
                elif self.watch:
                    for i, j in self._pairs:
                        apart = torch.sub(work[i], work[j], out=scratch[-1][: len(work[i])])
                        square = float(torch.dot(apart, apart))
                        if not math.isfinite(square):  # huge
                            apart = work[i].double() - work[j].double()
                            square = float(torch.dot(apart, apart))
                        distances[i, j] += square
                squares = [a + b for a, b in zip(squares, lengths, strict=True)]
                if same and alike:
                    result.copy_(raw[0])
                else:
                    count = len(weights)
                    stretch = Stretch(work[:count], work[count] if self.base is not None else None, name, start)
                    result.copy_(self.method.mix(stretch, weights, self.options, measured))
                if not convex and not bool(result.isfinite().all()):
                    raise UserError(f"the mixture of '{key}' overflows {dtype}: use smaller weights, or dtype=fp32")
                yield result
        if self.watch:
            self._facts[key] = Facts([digest.hexdigest() for digest in hashes], squares, distances, equal)

    def _square(self, key: str, model: int, values: Tensor) -> float:
        """Squared length, which is finite exactly if the values are, unless they are huge."""
        square = float(torch.dot(values, values))
        if not math.isfinite(square):
            if not bool(values.isfinite().all()):
                raise UserError(
                    f"'{key}' in '{self.models[model].path}' holds NaN or infinite values: its training diverged, "
                    "leave it out"
                )
            square = float(torch.dot(values.double(), values.double()))
        return square

    def _measure(self, key: str, weights: Sequence[float]) -> Any:
        """What the method has to know of the whole tensor that `key` is, or is a part of."""
        if self.method.measure is None or not self.info(key).dtype.is_floating_point:
            return None
        parts = self.models[0].parts(key)
        name = parts[0]
        if name not in self._measured:
            found = self.method.measure(lambda: self._passes(parts), weights, self.options)
            if len(parts) == 1:
                return found
            self._measured[name] = found  # the other parts are mixed with the same
        return self._measured[name]

    def _passes(self, parts: Sequence[str]) -> Iterable[Stretch]:
        for key in parts:
            dtype = self._working(key)
            with ExitStack() as stack:
                reads = [stack.enter_context(model.reader(key)) for model in self.models]
                for start, raw in _raw(reads, [model.info(key) for model in self.models]):
                    work = [piece.to(dtype) for piece in raw]
                    yield Stretch(work[:-1], work[-1], key, start) if self.base else Stretch(work, None, key, start)


def _raw(reads: Sequence[Read], infos: Sequence[TensorInfo]) -> Iterator[tuple[int, list[Tensor]]]:
    """Stretches as they are stored, each valid until the next is asked for."""
    numel = infos[0].numel
    buffers = [torch.empty(min(CHUNK, numel), dtype=info.dtype) for info in infos]
    for start in range(0, numel, CHUNK):
        raw = [buffer[: numel - start] for buffer in buffers]
        for read, piece in zip(reads, raw, strict=True):
            read(piece, start)
        yield start, raw


_INTEGERS: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _equal(a: Tensor, b: Tensor) -> bool:
    """In dtype and bit for bit."""
    kind = _INTEGERS[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def _fits(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether every finite value of one dtype is finite in the other."""
    return bool(
        stored.is_floating_point and dtype.is_floating_point and torch.finfo(stored).max <= torch.finfo(dtype).max
    )
