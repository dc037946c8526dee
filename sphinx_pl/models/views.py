"""An image and the views of it that an encoder sees (SPHINX, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [..., 3, S, S] -> float32, by the mean and deviation of each channel in 0..1."""
    return (pixels.float() / 255 - by_channel(mean, pixels)) / by_channel(std, pixels)


def by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """float32 [3, 1, 1] on the device of `like`. The host does not wait for the device."""
    return torch.tensor(values).to(like.device, non_blocking=True)[:, None, None]


def resize(pixels: Tensor, size: int, mode: str = "bicubic", half: bool = False) -> Tensor:
    """[N, 3, s, s] -> [N, 3, size, size], without antialiasing; `pixels` itself where it has that size.

    Args:
        mode: "bicubic" or "nearest".
        half: compute in float16 and round the result to it, as the original does.
    """
    if pixels.shape[-1] == size:
        return pixels
    source = pixels.half() if half else pixels
    return F.interpolate(source, size=(size, size), mode=mode).to(pixels.dtype)


def split_views(pixels: Tensor, size: int, grid: int, half: bool = False) -> Tensor:
    """[N, 3, S, S] -> [N, V, 3, size, size]: the whole image, then crops of it row by row.

    The crops are cut from the image at grid * size pixels a side, so that neighbours meet without a seam.
    """
    overview = resize(pixels, size, half=half)
    if grid == 1:
        return overview[:, None]
    crops = resize(pixels, grid * size, half=half).reshape(len(pixels), 3, grid, size, grid, size)
    crops = crops.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([overview[:, None], crops], dim=1)
