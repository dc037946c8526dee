"""Sums of 16- and 32-bit tensors in float64, rounded once, with the models' lengths and distances:
in one pass.

Each of these steps as an array operation of its own moves several times as many bytes through the
memory as are read and written. Here a block stays in a core's nearest cache from reading to
rounding. Compiled by numba when first used, and kept for later processes. Values are the same, bit
for bit, as those of `combine_` and `round_once`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.core import codegen, config
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor


def _use_whole_registers() -> None:
    """Use whole AVX-512 registers: LLVM's default is half, because of old CPUs' clocks."""
    features = codegen.get_host_cpu_features()  # type: ignore[no-untyped-call]
    if getattr(config, "CPU_FEATURES") is None and "+avx512f" in features:  # noqa: B009 (numba makes its attributes)
        setattr(config, "CPU_FEATURES", f"{features},-prefer-256-bit")  # noqa: B010


_use_whole_registers()


def _compiled(function: Any) -> Any:
    """The compiled function, kept for later processes if numba finds a folder to write."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


BLOCK = 1024
"""Elements that are worked on at once: 8 kB for each model."""

BF16, F16, F32 = 0, 1, 2
KINDS = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}

# Rounding to nearest, ties to even, of float64 to fewer bits: how many are dropped, the smallest
# normal number below which the distance between two is constant, and a number so large that the sum
# with it has that distance.
_DROPPED_BF16, _NORMAL_BF16, _LARGE_BF16 = 45, 2.0**-126, 1.5 * 2.0**-81
_DROPPED_F16, _NORMAL_F16, _LARGE_F16 = 42, 2.0**-14, 1.5 * 2.0**28
_MOST_F16 = np.float32(65504)
_SCALE_F16 = np.float32(2.0**112)  # between a float16's bits in the place of a float32's, and its value


def _bitcast(source: Any, target: Any) -> Any:
    """A function of compiled code: the number that has these bits."""

    @intrinsic
    def cast(typing_context: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), build

    return cast


_single, _single_bits = _bitcast(types.uint32, types.float32), _bitcast(types.float32, types.uint32)
_double, _double_bits = _bitcast(types.uint64, types.float64), _bitcast(types.float64, types.uint64)


@njit(nogil=True)
def _decode(bits: Any, kind: int) -> Any:
    """The value of a number of that kind."""
    there = np.uint32(bits)
    if kind == BF16:
        return np.float64(_single(np.uint32(there << np.uint32(16))))
    if kind == F16:
        special = np.uint32(0x7F800000) if (there & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
        moved = (there & np.uint32(0x7FFF)) << np.uint32(13) | (there & np.uint32(0x8000)) << np.uint32(16) | special
        return np.float64(_single(np.uint32(moved)) * _SCALE_F16)
    return np.float64(_single(there))


@njit(nogil=True)
def _round(value: Any, dropped: int, normal: float, large: float) -> Any:
    """A float64 to the float32 with as few bits as are left."""
    shift, one = np.uint64(dropped), np.uint64(1)
    half = (one << np.uint64(dropped - 1)) - one
    mask = ~((one << shift) - one)
    whole = _double_bits(value)
    kept = _double(np.uint64((whole + half + ((whole >> shift) & one)) & mask))
    small = np.copysign((value + large) - large, value)
    return np.float32(kept if abs(value) >= normal else small)


@njit(nogil=True)
def _encode(value: Any, kind: int) -> Any:
    """The bits of a value, rounded to a number of that kind."""
    if kind == BF16:
        return np.uint32(_single_bits(_round(value, _DROPPED_BF16, _NORMAL_BF16, _LARGE_BF16)) >> np.uint32(16))
    if kind == F16:
        number = _round(value, _DROPPED_F16, _NORMAL_F16, _LARGE_F16)
        number = (np.copysign(np.float32(np.inf), number) if abs(number) > _MOST_F16 else number) / _SCALE_F16
        bits = _single_bits(number)
        return np.uint32((bits >> np.uint32(13)) & np.uint32(0x7FFF) | (bits >> np.uint32(16)) & np.uint32(0x8000))
    return _single_bits(np.float32(value))


# In any order, which is what lets several be added at once.
@njit(nogil=True, fastmath={"reassoc", "contract"})
def _add_square(total: Any, value: Any) -> Any:
    return total + value * value


@njit(nogil=True)
def _decode_row(raw: Any, kind: int, out: Any) -> Any:
    """The values of `raw` into `out`; returns the sum of their squares."""
    square = 0.0
    for i in range(len(raw)):
        value = _decode(raw[i], kind)
        out[i] = value
        square = _add_square(square, value)
    return square


@njit(nogil=True)
def _square_distance(a: Any, b: Any) -> Any:
    square = 0.0
    for i in range(len(a)):
        square = _add_square(square, a[i] - b[i])
    return square


@njit(nogil=True)
def _sum_two(a: Any, b: Any, kind: int, ca: float, cb: float, out: Any) -> Any:
    """ca·a + cb·b into `out`; returns the sums of the squares of a, b and a - b."""
    squares_a, squares_b, apart = 0.0, 0.0, 0.0
    for i in range(len(a)):
        x, y = _decode(a[i], kind), _decode(b[i], kind)
        squares_a, squares_b, apart = _add_square(squares_a, x), _add_square(squares_b, y), _add_square(apart, x - y)
        out[i] = x * ca + y * cb
    return squares_a, squares_b, apart


@njit(nogil=True)
def _encode_row(values: Any, kind: int, out: Any) -> None:
    for i in range(len(out)):
        out[i] = _encode(values[i], kind)


@_compiled
def _mix(
    raw: Any, kind: int, coefficients: Any, pairs: Any, out: Any, out_kind: int, squares: Any, distances: Any
) -> None:
    models, numel = raw.shape
    work, total = np.empty((models, BLOCK)), np.empty(BLOCK)
    two = models == 2 and len(pairs) == 1 and coefficients.all()
    for start in range(0, numel, BLOCK):
        count = min(BLOCK, numel - start)
        stop = start + count
        if two:
            a, b = raw[0, start:stop], raw[1, start:stop]
            squares_a, squares_b, apart = _sum_two(a, b, kind, coefficients[0], coefficients[1], total)
            squares[0] += squares_a
            squares[1] += squares_b
            distances[0] += apart
            _encode_row(total[:count], out_kind, out[start:stop])
            continue
        for j in range(models):
            squares[j] += _decode_row(raw[j, start:stop], kind, work[j])
        for p in range(len(pairs)):
            distances[p] += _square_distance(work[pairs[p, 0], :count], work[pairs[p, 1], :count])
        first = True
        for j in range(models):
            c = coefficients[j]
            if c == 0:
                continue
            if first:
                for i in range(count):
                    total[i] = work[j, i] * c
                first = False
            else:
                for i in range(count):
                    total[i] = total[i] + work[j, i] * c
        if first:
            total[:count] = 0
        _encode_row(total[:count], out_kind, out[start:stop])


def _bits(tensor: Tensor) -> NDArray[Any]:
    signed: NDArray[Any] = tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
    return signed.view(np.uint16 if tensor.itemsize == 2 else np.uint32)


def mix_stretch(
    raw: Tensor,
    coefficients: NDArray[np.float64],
    pairs: NDArray[np.int64],
    out: Tensor,
    squares: NDArray[np.float64],
    distances: NDArray[np.float64],
) -> None:
    """Σ cᵢ·tᵢ of the rows of `raw` [models, n] into `out` [n], both of a dtype in `KINDS`.

    Args:
        coefficients: [models].
        pairs: [pairs, 2], of models.
        squares: [models]; each row's squared length is added.
        distances: [pairs]; the squared distance of the two rows is added.
    """
    _mix(
        _bits(raw),
        KINDS[raw.dtype],
        coefficients,
        pairs,
        _bits(out),
        KINDS[out.dtype],
        squares,
        distances,
    )
