"""The device and the precision of an evaluation, as the scripts' keys name them."""

from __future__ import annotations

import functools
import logging

import torch

from sphinx_pl.runtime.ranks import share_cores
from sphinx_pl.utils.errors import UserError, suggest

log = logging.getLogger(__name__)
PRECISIONS = ("fp32", "bf16")


def check_precision(precision: str) -> None:
    """Check that the precision is fp32 or bf16.

    Raises:
        UserError: it is anything else.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision='{precision}': {suggest(precision, PRECISIONS)}")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that the key `device` names.

    `auto` takes a GPU if there is one; each of several processes takes its own. Otherwise it takes
    the CPU, sets its number of threads and logs it.

    Raises:
        UserError: this machine has no such device.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = f"cuda:{local_rank % gpus}" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is no device: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"device={name}: PyTorch finds {gpus} GPUs here; device=auto takes a GPU if there is one")
    if device.type == "cpu":
        _log_once(share_cores())
    return device


@functools.cache
def _log_once(message: str) -> None:
    """Log the message once, although a script asks for its device several times."""
    log.info(message)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """An autocast context: bf16 multiplies matrices in bfloat16, fp32 changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
