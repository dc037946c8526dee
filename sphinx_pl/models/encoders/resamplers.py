"""What turns an encoder's tokens into fewer: an average of neighbours, or queries (qformer.py).

A resampler belongs to the projections: it trains with them, and the encoder may stay frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sphinx_pl.models.checks import positive, require
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.registry import Registry


@dataclass
class ResamplerConfig:
    """The keys of a kind of resampler."""

    kind: str

    @property
    def tokens(self) -> int:
        """Tokens of a view."""
        raise NotImplementedError

    def width_of(self, width: int) -> int:
        """Channels of its tokens behind an encoder with tokens of `width` channels."""
        return width

    def check(self, section: str, grid: int | None) -> None:
        """Refuse sizes that do not fit.

        Args:
            grid: patches a side of the encoder's map; None: it has none.

        Raises:
            UserError: the encoder's tokens cannot be resampled so.
        """


class Resampler(nn.Module):
    """[M, tokens, width] of an encoder -> [M, fewer tokens, width']."""

    config_class: ClassVar[type[ResamplerConfig]]

    def __init__(self, config: Any, width: int, grid: int | None) -> None:
        super().__init__()

    def flops(self, tokens: int) -> float:
        """FLOPs of the forward pass for the `tokens` of one view."""
        return 0.0


RESAMPLERS: Registry[type[Resampler]] = Registry("resampler")

Kind = TypeVar("Kind", bound=type[Resampler])


def resampler(kind: str, config: type[ResamplerConfig]) -> Callable[[Kind], Kind]:
    """A class decorator: the resampler is built for sections with this `kind`."""

    def add(module: Kind) -> Kind:
        module.config_class = config
        RESAMPLERS.register(kind, module)
        return module

    return add


def resampler_config(values: Any, section: str) -> ResamplerConfig:
    """The configuration of a resampler from its section.

    Raises:
        UserError: an unknown kind or key, or a wrong value.
    """
    if isinstance(values, ResamplerConfig):
        return values
    if not isinstance(values, Mapping) or "kind" not in values:
        raise UserError(f"{section} needs a kind, such as {section}.kind={next(iter(RESAMPLERS))}")
    return build(RESAMPLERS[str(values["kind"])].config_class, values, section)


@dataclass
class AverageConfig(ResamplerConfig):
    """The mean of neighbouring patches: `tokens` of them, as a map whose sides differ least."""

    tokens: int = 64

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the pooled map."""
        rows = next(n for n in range(int(self.tokens**0.5), 0, -1) if self.tokens % n == 0)
        return rows, self.tokens // rows

    def check(self, section: str, grid: int | None) -> None:
        positive(section, self, "tokens")
        require(grid is not None, f"{section}: the tokens of this encoder are no map of patches: use a Q-Former")
        rows, columns = self.shape
        require(
            columns <= (grid or 0),
            f"{section}.tokens={self.tokens} needs a map of {rows}x{columns} patches but the encoder has {grid}x{grid}",
        )


@resampler("average", AverageConfig)
class AveragePool(Resampler):
    """The patches' adaptive average. Tokens without a place, such as the class token, are dropped."""

    def __init__(self, config: AverageConfig, width: int, grid: int | None) -> None:
        super().__init__(config, width, grid)
        assert grid is not None
        self.shape, self.grid = config.shape, grid

    def forward(self, tokens: Tensor) -> Tensor:
        """[M, tokens, C] -> [M, fewer, C], row by row."""
        patches = torch.unflatten(tokens[:, -(self.grid**2) :].transpose(1, 2), 2, (self.grid, self.grid))
        return F.adaptive_avg_pool2d(patches, self.shape).flatten(2).transpose(1, 2)
