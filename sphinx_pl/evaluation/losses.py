"""Held-out losses: how well a model predicts answers that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sphinx_pl.data.schema import Batch
from sphinx_pl.evaluation.bootstrap import draws, interval
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.device import autocast
from sphinx_pl.utils.errors import UserError


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

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `mean` over samples: an answer's tokens are not independent."""
        return interval(resampled_means([self])[:, 0].numpy())


def resampled_means(losses: Sequence[SourceLoss], resamples: int = 1000, seed: int = 0) -> Tensor:
    """The means of several models' losses on the same samples [resamples, losses] float64.

    All get the same resamples (paired, Efron & Tibshirani 1993). A hard sample is hard for all of
    them, so their differences are more certain than their values.
    """
    sums = torch.stack([loss.sums for loss in losses], dim=1)
    tokens = torch.stack([loss.tokens for loss in losses], dim=1)
    counts = np.ones(len(sums), dtype=np.int64)
    times = (torch.from_numpy(chunk).double() for chunk in draws(counts, resamples, seed))
    return torch.cat([chunk @ sums / (chunk @ tokens) for chunk in times])


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
