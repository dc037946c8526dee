"""Where the parameters of a model live: whole on one device, or a part on each rank as `sphinx_pl.distributed` does."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from sphinx_pl.models.sphinx import Sphinx


class Placement(Protocol):
    """Where parameters live."""

    reads: bool
    """Whether this process has to know values; the others get theirs from one that does."""
    device: torch.device
    """Where modules compute."""
    dtype: torch.dtype
    """The dtype of tables that belong to no checkpoint, such as rotary angles."""

    def prepare(self, model: Sphinx) -> None:
        """Before the first parameter; the model is on the meta device, its frozen parts without gradients."""

    def put(self, owner: nn.Module, name: str, value: Tensor | None) -> None:
        """Give `owner`'s meta parameter `name` its memory, and the value where there is one. All ranks call it."""


class OneDevice:
    """All of it on one device, in float32."""

    def __init__(self, device: torch.device | str = "cpu", reads: bool = True) -> None:
        self.device = torch.device(device)
        self.dtype = torch.float32
        self.reads = reads

    def prepare(self, model: Sphinx) -> None:
        pass

    def put(self, owner: nn.Module, name: str, value: Tensor | None) -> None:
        like = owner.get_parameter(name)
        data = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        if value is not None:
            data.copy_(value)
        setattr(owner, name, nn.Parameter(data, requires_grad=like.requires_grad))


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Move `module` to a device: its meta tensors get memory without values, others keep theirs."""

    def placed(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    module._apply(placed)  # type: ignore[no-untyped-call]
