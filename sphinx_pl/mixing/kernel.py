"""Sums of 16- and 32-bit tensors in float64, rounded once, with the models' lengths and distances: in one pass.

Each of these steps as an array operation of its own moves several times as many bytes through the memory as are read
and written. Here a block stays in a core's nearest cache from reading to rounding. Compiled by numba when first used,
and kept for later processes. Values are the same, bit for bit, as those of `combine_` and `round_once`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 1024
"""Elements that are worked on at once: 8 kB for each model."""

BF16, F16, F32 = 0, 1, 2
KINDS = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}

# Rounding to nearest, ties to even, of float64 to fewer bits: how many are dropped, the smallest normal number below
# which the distance between two is constant, and a number so large that the sum with it has that distance.
_DROPPED_BF16, _NORMAL_BF16, _LARGE_BF16 = 45, 2.0**-126, 1.5 * 2.0**-81
_DROPPED_F16, _NORMAL_F16, _LARGE_F16 = 42, 2.0**-14, 1.5 * 2.0**28
_MOST_F16 = np.float32(65504)
_SCALE_F16 = np.float32(2.0**112)  # between a float16's bits in the place of a float32's, and its value


@njit(nogil=True, cache=True)
def _decode(raw: Any, kind: int, bits: Any, single: Any, out: Any) -> None:
    """The values of `raw` (bits) into `out`, by way of `bits` and `single`, which are the same memory."""
    if kind == BF16:
        for i in range(len(raw)):
            bits[i] = np.uint32(raw[i]) << np.uint32(16)
    elif kind == F16:
        for i in range(len(raw)):
            there = np.uint32(raw[i])
            special = np.uint32(0x7F800000) if (there & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
            bits[i] = (
                (there & np.uint32(0x7FFF)) << np.uint32(13) | (there & np.uint32(0x8000)) << np.uint32(16) | special
            )
        for i in range(len(raw)):
            single[i] *= _SCALE_F16
    else:
        for i in range(len(raw)):
            bits[i] = np.uint32(raw[i])
    for i in range(len(raw)):
        out[i] = single[i]


@njit(nogil=True, cache=True)
def _round(
    values: Any, whole: Any, kept: Any, kept_bits: Any, single: Any, dropped: int, normal: float, large: float
) -> None:
    """float64 `values` (whose bits are `whole`) to float32 numbers with as few bits as are left.

    `kept` and its bits are room for as many. No two arrays of one loop are the same memory, which is what lets several
    elements be taken at once.
    """
    shift, one = np.uint64(dropped), np.uint64(1)
    half = (one << np.uint64(dropped - 1)) - one
    mask = ~((one << shift) - one)
    for i in range(len(values)):
        kept_bits[i] = (whole[i] + half + ((whole[i] >> shift) & one)) & mask
    for i in range(len(values)):
        value = values[i]
        small = np.copysign((value + large) - large, value)
        single[i] = np.float32(kept[i] if abs(value) >= normal else small)


@njit(nogil=True, cache=True)
def _encode(values: Any, whole: Any, kept: Any, kept_bits: Any, kind: int, bits: Any, single: Any, out: Any) -> None:
    """`values` rounded to `out` (bits)."""
    if kind == BF16:
        _round(values, whole, kept, kept_bits, single, _DROPPED_BF16, _NORMAL_BF16, _LARGE_BF16)
        for i in range(len(out)):
            out[i] = bits[i] >> np.uint32(16)
    elif kind == F16:
        _round(values, whole, kept, kept_bits, single, _DROPPED_F16, _NORMAL_F16, _LARGE_F16)
        for i in range(len(out)):
            number = single[i]
            single[i] = (np.copysign(np.float32(np.inf), number) if abs(number) > _MOST_F16 else number) / _SCALE_F16
        for i in range(len(out)):
            out[i] = (bits[i] >> np.uint32(13)) & np.uint32(0x7FFF) | (bits[i] >> np.uint32(16)) & np.uint32(0x8000)
    else:
        for i in range(len(out)):
            single[i] = np.float32(values[i])
        for i in range(len(out)):
            out[i] = bits[i]


# Sums in any order, which is what lets several be taken at once.
@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _square(a: Any) -> float:
    total = 0.0
    for i in range(len(a)):
        total += a[i] * a[i]
    return total


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _square_distance(a: Any, b: Any) -> float:
    total = 0.0
    for i in range(len(a)):
        total += (a[i] - b[i]) * (a[i] - b[i])
    return total


@njit(nogil=True, cache=True)
def _mix(
    raw: Any, kind: int, coefficients: Any, pairs: Any, out: Any, out_kind: int, squares: Any, distances: Any
) -> None:
    models, numel = raw.shape
    work, total, kept, bits = np.empty((models, BLOCK)), np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK, np.uint32)
    single, whole, kept_bits = bits.view(np.float32), total.view(np.uint64), kept.view(np.uint64)
    for start in range(0, numel, BLOCK):
        count = min(BLOCK, numel - start)
        stop = start + count
        for j in range(models):
            _decode(raw[j, start:stop], kind, bits, single, work[j])
            squares[j] += _square(work[j, :count])
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
        _encode(total[:count], whole[:count], kept, kept_bits, out_kind, bits, single, out[start:stop])


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
