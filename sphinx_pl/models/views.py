"""An image and the views of it that the towers see (SPHINX, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, S, S] -> float32 with CLIP's mean and deviation, the input of every tower."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device)[:, None, None]
    std = torch.tensor(CLIP_STD, device=pixels.device)[:, None, None]
    return (pixels.float() / 255 - mean) / std


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
