"""Where and how precisely models are evaluated: the keys `device` and `precision` of the entry scripts."""

from __future__ import annotations

import functools
import logging

import torch

from sphinx_pl.runtime.ranks import share_cores
from sphinx_pl.utils.errors import UserError, suggest

log = logging.getLogger(__name__)
PRECISIONS = ("fp32", "bf16")


def check_precision(precision: str) -> None:
    """Refuse what is neither fp32 nor bf16.

    Raises:
        UserError: it is something else.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision='{precision}': {suggest(precision, PRECISIONS)}")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`: a GPU if there is one (of several processes each its own), else the CPU, whose threads are set and said.

    Raises:
        UserError: no such device here.
    """
    found = torch.cuda.device_count()
    if name == "auto":
        name = f"cuda:{local_rank % found}" if found else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is no device: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"device={name}: PyTorch finds {found} GPUs here; device=auto takes what there is")
    if device.type == "cpu":
        _tell(share_cores())
    return device


@functools.cache
def _tell(message: str) -> None:
    """Log it once: a script asks for its device more than once."""
    log.info(message)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16: matrix multiplications in bfloat16; fp32: no change."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
