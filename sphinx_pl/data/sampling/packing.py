"""Samples -> rows -> micro-batches: the samples of a row, and the micro-batch of each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sphinx_pl.data.schema import Sample
from sphinx_pl.utils.config import within
from sphinx_pl.utils.errors import UserError

WEIGHTINGS: dict[str, Callable[[int], float]] = {
    "token": lambda targets: 1.0,
    # InternVL's "square averaging" lies between a mean over tokens and a mean over answers.
    "sqrt": lambda targets: 1.0 / math.sqrt(targets),
}
"""Name -> the weight of one supervised token in an answer with this number of them."""
Row = list[Sample]
"""The samples that share one row of a batch."""


@dataclass
class PackingConfig:
    """The section `data.packing`.

    A micro-batch has `micro_batch_rows` rows of `row_length` tokens. A row holds at most
    `images_per_row` images; 0 sets no bound.
    """

    row_length: int = within(at_least=1, at_most=2**24)
    micro_batch_rows: int = within(at_least=1, at_most=2**16)
    images_per_row: int = within(0, at_least=0, at_most=2**16)
    weighting: str = "token"
    # What is drawn beyond a global batch's capacity, as a share of it. More gives the packer more
    # choice, and changes the order of the data more.
    look_ahead: float = within(0.5, at_least=0, at_most=1000)

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise UserError(f"data.packing.weighting='{self.weighting}' must be one of {', '.join(WEIGHTINGS)}")


def first_fit_decreasing(
    samples: Sequence[Sample], rows: int, row_length: int, images_per_row: int = 0
) -> tuple[list[Row], list[Sample]]:
    """At most `rows` rows, and the samples that did not fit."""
    packed: list[Row] = []
    free: list[int] = []
    images: list[int] = []
    left: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: -sample.length):  # stable: equal lengths keep their order
        for i in range(len(packed)):
            if free[i] >= sample.length and (
                not images_per_row or images[i] + len(sample.images) <= images_per_row or not sample.images
            ):
                packed[i].append(sample)
                free[i] -= sample.length
                images[i] += len(sample.images)
                break
        else:
            if len(packed) < rows and sample.length <= row_length:
                packed.append([sample])
                free.append(row_length - sample.length)
                images.append(len(sample.images))
            else:
                left.append(sample)
    return packed, left


_CANDIDATES = 256
"""Samples that may fill the rest of a row. A row is full long before so many were tried, but the
time is bounded."""


def fullest_rows(
    samples: Sequence[Sample], rows: int, row_length: int, images_per_row: int = 0, first: int = 1
) -> tuple[list[Row], list[Sample]]:
    """At most `rows` rows, and the samples that are left over, in order.

    Each row begins with the next sample in order, so none waits for long; the first row begins with
    the first `first` samples. The rest of a row is the choice of samples that fills it best,
    earlier ones rather than later ones. This fills more than first-fit decreasing does, and it
    takes a stream in its order.
    """
    left = list(samples)
    packed: list[Row] = []
    while left and len(packed) < rows:
        count = 1 if packed else first
        row, left = left[:count], left[count:]
        room = row_length - sum(sample.length for sample in row)
        images = images_per_row - sum(len(sample.images) for sample in row) if images_per_row else None
        chosen = set(_fullest(left[:_CANDIDATES], room, images))
        row += [left[i] for i in sorted(chosen)]
        left = [sample for i, sample in enumerate(left) if i not in chosen]
        packed.append(row)
    return packed, left


def _fullest(samples: Sequence[Sample], room: int, images: int | None) -> list[int]:
    """The samples that come nearest to `room` tokens together and have at most `images` images
    (None: any number)."""
    # Bit n of reach[i][k]: some of the first i samples have n tokens together, and k images where
    # these are bounded.
    inside = (1 << (room + 1)) - 1
    reach = [[1] + [0] * max(images or 0, 0)]
    weights = [len(sample.images) if images is not None else 0 for sample in samples]
    for sample, weight in zip(samples, weights, strict=True):
        if any(bits >> room for bits in reach[-1]):  # full
            break
        before, n = reach[-1], sample.length
        taken = [before[k - weight] << n & inside if k >= weight else 0 for k in range(len(before))]
        reach.append([a | b for a, b in zip(before, taken, strict=True)])
    total, used = max((bits.bit_length() - 1, k) for k, bits in enumerate(reach[-1]))
    chosen = []
    for i in range(len(reach) - 1, 0, -1):
        if not reach[i - 1][used] >> total & 1:  # this total needs sample i - 1
            chosen.append(i - 1)
            total, used = total - samples[i - 1].length, used - weights[i - 1]
    return chosen


def deal(rows: list[Row], bins: int) -> list[list[Row]]:
    """Rows over `bins` micro-batches, equal in number.

    Images are spread evenly: the rows with most images come first, and are dealt to and fro.
    """
    order = sorted(rows, key=lambda row: -sum(len(sample.images) for sample in row))
    dealt: list[list[Row]] = [[] for _ in range(bins)]
    for i, row in enumerate(order):
        turn, place = divmod(i, bins)
        dealt[place if turn % 2 == 0 else bins - 1 - place].append(row)
    return dealt
