"""ZeRO-3 (Rajbhandari et al. 2020) by DeepSpeed: weights, gradients and optimizer states in parts, one on each rank.

Lightning's strategy with what this project needs beyond it: it also runs on CPU processes (the same code path, for tests
and small machines), the model is born in parts, losses are divided once (Lightning and DeepSpeed both divide by the
number of micro-batches), and checkpoints are those of `sphinx_pl.checkpoint.training`.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from sphinx_pl.distributed.checkpointing import STEP
from sphinx_pl.distributed.sharded import Sharded
from sphinx_pl.errors import UserError
from sphinx_pl.models.sphinx import Sphinx

def import_deepspeed() -> None:
    """Without what it prints while it looks for compilers and libraries that nothing here uses."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
        try:
            importlib.import_module("deepspeed")
        finally:
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


import_deepspeed()

LIVE = 1_000_000_000
"""Gathered parameters of sharded layers at a time: DeepSpeed's default."""


class ZeroPrecision(DeepSpeedPrecision):
    """Batches keep their dtypes (a target's weight is float32 whatever the model is), losses are scaled by Lightning."""

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


class Zero3(Sharded, DeepSpeedStrategy):
    """ZeRO-3 on GPUs or CPU processes.

    Args:
        frozen: "whole" keeps frozen parts on every rank, gathered once; "sharded" gathers them whenever they run.
        offload_optimizer, offload_parameters: null, "cpu" or "nvme" (with `nvme_path`).
        reduce_dtype: of gradients on the wire, and of their sums over micro-batches.
        zero: further keys of DeepSpeed's `zero_optimization` section.
        timeout_minutes: after which a collective call without all ranks is an error.
    """

    def __init__(
        self,
        frozen: str = "whole",
        offload_optimizer: str | None = None,
        offload_parameters: str | None = None,
        nvme_path: str | None = None,
        reduce_dtype: str = "fp32",
        zero: dict[str, Any] | None = None,
        timeout_minutes: float = 30,
        **options: Any,
    ) -> None:
        from datetime import timedelta

        if frozen not in ("whole", "sharded"):
            raise UserError(f"trainer.strategy.frozen={frozen} must be whole or sharded")
        for key, device in (("offload_optimizer", offload_optimizer), ("offload_parameters", offload_parameters)):
            if device not in (None, "cpu", "nvme"):
                raise UserError(f"trainer.strategy.{key}={device} must be null, cpu or nvme")
            if device == "nvme" and not nvme_path:
                raise UserError(f"trainer.strategy.{key}=nvme needs trainer.strategy.nvme_path, a folder on that disk")
        self.frozen = frozen
        section: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 10_000} | (zero or {})
        for key, device in (("offload_optimizer", offload_optimizer), ("offload_param", offload_parameters)):
            if device:
                section[key] = {"device": device, "pin_memory": torch.cuda.is_available()}
                section[key] |= {"nvme_path": nvme_path} if device == "nvme" else {}
        config = {
            "zero_optimization": section,
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's own throughput figures are not used
            "communication_data_type": reduce_dtype,
            "data_types": {"grad_accum_dtype": reduce_dtype},
        }
        super().__init__(config=config, timeout=timedelta(minutes=timeout_minutes), **options)

    # -- on CPU processes -------------------------------------------------------------------------------------------

    @property
    def on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def root_device(self) -> torch.device:
        # With an index, which Lightning hands to DeepSpeed.
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    def setup_environment(self) -> None:
        if not self.on_cpu:
            return super().setup_environment()
        from deepspeed.ops import __compatible_ops__

        # Compiles for 40 seconds, and gloo does without it.
        __compatible_ops__["deepspeed_shm_comm"] = False
        self.accelerator.setup_device(torch.device("cpu"))  # type: ignore[union-attr]
        self.setup_distributed()

    def setup_distributed(self) -> None:
        if not self.on_cpu:
            return super().setup_distributed()
        self.set_world_ranks()
        self._process_group_backend = "gloo"
        self._init_deepspeed_distributed()

    # -- precision --------------------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Any:
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        self._precision_plugin = ZeroPrecision(plugin.precision) if isinstance(plugin, DeepSpeedPrecision) else plugin

    # -- building ---------------------------------------------------------------------------------------------------

    def model_sharded_context(self) -> AbstractContextManager[None]:
        return nullcontext()  # `placement` shards each parameter as soon as it exists

    def placement(self) -> Partitioned:
        self._init_config_if_needed()
        dtype = torch.float32 if self.precision_plugin.precision == "32-true" else torch.bfloat16
        return Partitioned(self, dtype)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        if optimizer is not None:
            self.note_groups(optimizer)
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    # -- what this rank holds ---------------------------------------------------------------------------------------

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]

    def held(self, parameter: Any) -> tuple[int, int]:
        part = parameter.ds_tensor.ds_numel
        start = self.global_rank * part
        return min(start, parameter.ds_numel), min(start + part, parameter.ds_numel)

    def _in_flat(self, parameter: Any) -> tuple[int, slice]:
        """Which of DeepSpeed's flat buffers has this rank's part, and where; without the padding at its end."""
        buffer, offset, _ = self.optimizers[0].grad_position[self.optimizers[0].get_param_id(parameter)]  # type: ignore[attr-defined]
        start, stop = self.held(parameter)
        return buffer, slice(offset, offset + stop - start)

    def local_weight(self, parameter: Any) -> Tensor:
        if not parameter.requires_grad:
            start, stop = self.held(parameter)
            return parameter.ds_tensor[: stop - start]  # type: ignore[no-any-return]
        buffer, part = self._in_flat(parameter)
        return self.optimizers[0].fp32_partitioned_groups_flat[buffer].data[part]  # type: ignore[attr-defined,no-any-return]

    def local_states(self, parameter: Any) -> dict[str, Any]:
        buffer, part = self._in_flat(parameter)
        zero: Any = self.optimizers[0]
        states = zero.optimizer.state.get(zero.fp32_partitioned_groups_flat[buffer], {})
        return {k: v if k == STEP else v[part] for k, v in states.items() if isinstance(v, Tensor)}

    def allocate_states(self) -> None:
        """By a step without gradient, whose effect on the weights is undone."""
        zero: Any = self.optimizers[0]
        for buffer in zero.fp32_partitioned_groups_flat:
            kept, buffer.grad = buffer.data.clone(), torch.zeros_like(buffer)
            options = [dict(group) for group in zero.optimizer.param_groups]
            for group in zero.optimizer.param_groups:
                group["params"] = [buffer] if any(p is buffer for p in group["params"]) else []
            zero.optimizer.step()
            for group, before in zip(zero.optimizer.param_groups, options, strict=True):
                group["params"] = before["params"]
            buffer.data.copy_(kept)
            buffer.grad = None

    def restored(self) -> None:
        """The weights that modules compute with are the rounded masters; what was gathered is out of date."""
        zero: Any = self.optimizers[0]
        for buffer in range(len(zero.fp32_partitioned_groups_flat)):
            zero.fp16_partitioned_groups_flat[buffer].data.copy_(zero.fp32_partitioned_groups_flat[buffer].data)
            zero._unflatten_partitioned_parameters(buffer)
        for parameter in self._sphinx.parameters():
            parameter.partition(has_been_updated=False)  # type: ignore[attr-defined]


class Partitioned:
    """Each parameter is partitioned as soon as it exists; the first rank knows its values."""

    def __init__(self, strategy: Zero3, dtype: torch.dtype) -> None:
        from deepspeed import zero

        self.strategy = strategy
        self.dtype = dtype
        self.reads = strategy.is_global_zero
        self._init: Any = zero.Init(module=nn.Module(), config_dict_or_path=strategy.config, dtype=dtype)

    def prepare(self, model: Sphinx) -> None:
        if self.strategy.frozen == "whole":
            # They count as live, and would leave no room for those that are gathered in turn.
            kept = sum(p.numel() for p in model.parameters() if not p.requires_grad)
            section = self.strategy.config["zero_optimization"]  # type: ignore[index]
            section.setdefault("stage3_max_live_parameters", LIVE + kept)

    def put(self, owner: nn.Module, name: str, value: Tensor | None) -> None:
        like = owner.get_parameter(name)
        device = self.strategy.root_device
        data = torch.empty(like.shape, dtype=self.dtype, device=device)
        if value is not None:
            data.copy_(value)
        parameter = nn.Parameter(data, requires_grad=like.requires_grad)
        setattr(owner, name, parameter)
        self._init._convert_to_zero_parameters([parameter])  # sends the first rank's values, keeps this rank's part
        if not like.requires_grad and self.strategy.frozen == "whole":
            parameter.ds_persist = True  # type: ignore[attr-defined]  # stays gathered from its first use on
