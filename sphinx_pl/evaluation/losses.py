"""Held-out losses: how well a model predicts answers that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sphinx_pl.data.schema import Batch
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.device import autocast
from sphinx_pl.utils.errors import UserError


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The ends of the middle `level` of resampled values [resamples]."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = torch.quantile(values, ends).tolist()
    return low, high


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """Negative log-likelihood over one source, in nats. It is stored per sample, so that it has an
    interval.

    Attributes:
        sums: [samples] float64, the sum over the supervised tokens of each sample.
        tokens: [samples] float64, their number.
    """

    sums: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """The loss per supervised token; all tokens count alike."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def count(self) -> int:
        """The number of supervised tokens."""
        return int(self.tokens.sum())

    def interval(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """The percentile bootstrap interval of `mean` over samples, since the tokens of one answer
        are not independent."""
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(len(self.sums), (resamples, len(self.sums)), generator=generator)
        return interval(self.sums[draws].sum(1) / self.tokens[draws].sum(1), level)


@torch.no_grad()
def held_out_losses(
    model: Sphinx, loaders: Mapping[str, Iterable[Batch]], precision: str = "fp32"
) -> dict[str, SourceLoss]:
    """The loss of `model` on each source, in eval mode and on the model's device.

    Unlike in the training loss, all supervised tokens count alike, so that different recipes
    compare.

    Args:
        loaders: source name -> its batches.
        precision: "bf16" runs under autocast, "fp32" does not.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        losses = {}
        for name, batches in loaders.items():
            parts = []
            for batch in batches:
                with autocast(device, precision):
                    result = model.token_losses(batch.to(device))
                parts.append(_per_segment(batch, result.nll, result.index))
            loss = SourceLoss(torch.cat([sums for sums, _ in parts]), torch.cat([counts for _, counts in parts]))
            if not len(loss.sums):
                raise UserError(f"held-out source '{name}' has no usable target: check the paths of its images")
            losses[name] = loss
        return losses
    finally:
        model.train(training)


def _per_segment(batch: Batch, nll: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and number of `nll` [M], at flat positions `index` [M], for each segment that has a
    supervised token."""
    rows = len(batch.segment_ids)
    most = int(batch.segment_ids.max()) + 1
    segments = batch.segment_ids + most * torch.arange(rows).unsqueeze(1)  # unique over rows
    place = segments.flatten()[index.cpu()].long()
    sums = torch.bincount(place, weights=nll.double().cpu(), minlength=rows * most)
    counts = torch.bincount(place, minlength=rows * most)
    return sums[counts > 0], counts[counts > 0].double()
