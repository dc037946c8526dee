"""The resolvers that the configurations in `conf/` compute with."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sphinx_pl.runtime.ranks import count_devices
from sphinx_pl.utils.errors import UserError


def _validation_interval(every: int, max_steps: int, accumulate: int) -> int:
    """The optimizer steps between validations (0: only at the end) in micro-batches."""
    return int(every or max_steps) * int(accumulate)


def _micro_batches(global_batch_rows: int | None, rows: int, devices: Any, num_nodes: int) -> int:
    """Return the micro-batches of an optimizer step on each rank.

    All ranks together then process `global_batch_rows` rows in a step.
    """
    if global_batch_rows is None:
        return 1
    if (per_node := count_devices(devices)) is None:  # All GPUs of the machine.
        import torch

        per_node = max(1, torch.cuda.device_count())
    at_once = int(rows) * per_node * int(num_nodes)
    if global_batch_rows % at_once:
        raise UserError(
            f"stage.global_batch_rows={global_batch_rows} is not a multiple of "
            f"data.packing.micro_batch_rows={rows} * {per_node} * {num_nodes} (trainer.devices, trainer.num_nodes): "
            "change one of them, or set stage.accumulate instead"
        )
    return int(global_batch_rows) // at_once


def _mixed_precision(accelerator: str) -> str:
    """Return bf16 autocast over fp32 weights, or fp32 on a CPU without bf16 instructions.

    On such a CPU bf16 takes twice as long.
    """
    import torch

    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        about = Path("/proc/cpuinfo")
        words = about.read_text().split() if about.exists() else ()
        return "bf16-mixed" if {"avx512_bf16", "amx_bf16"}.intersection(words) else "32-true"
    return "bf16-mixed"


def _run_folder(plan: bool, output_dir: Any, run: Any) -> str:
    """Return the run folder, or a temporary folder for a plan.

    Hydra writes into the run folder before the script begins, and a plan must leave no folder.

    Raises:
        UserError: a part of the path is empty, as where a shell's variable is not set. Then the
            folder would be another one, even one at the root of the disk.
    """
    for key, value in (("output_dir", output_dir), ("run", run)):
        if value is None or not str(value).strip():
            raise UserError(f"{key} is empty: give the name of a folder, or omit it")
    if not plan:
        return f"{output_dir}/{run}"
    temporary = tempfile.mkdtemp(prefix="plan-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def register_resolvers() -> None:
    """Register the resolvers of the configurations in conf/ beside those of Hydra and OmegaConf."""
    OmegaConf.register_new_resolver("validation_interval", _validation_interval, replace=True)
    OmegaConf.register_new_resolver("micro_batches", _micro_batches, replace=True)
    OmegaConf.register_new_resolver("mixed_precision", _mixed_precision, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True, use_cache=True)
