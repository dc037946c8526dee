"""ZeRO-3 (Rajbhandari et al.

2020) by DeepSpeed: each rank holds a part of weights, gradients and optimizer states.

This is Lightning's strategy with additions. It also runs on CPU processes (the same code path, for
tests and small machines), and it builds the model in parts. It divides losses once, although both
Lightning and DeepSpeed divide by the number of micro-batches. Its checkpoints are those of
`sphinx_pl.checkpoints.training`.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from sphinx_pl.distributed.checkpointing import STEP
from sphinx_pl.distributed.sharded import Sharded
from sphinx_pl.models.sphinx import Sphinx, whole_shape
from sphinx_pl.utils.errors import UserError


def import_deepspeed() -> None:
    """Import DeepSpeed without its output about compilers and libraries that are not used here."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.stdout.flush()
    sys.stderr.flush()
    descriptors = os.dup(1), os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
        try:
            operations: Any = importlib.import_module("deepspeed.ops")
            if not torch.cuda.is_available():
                # This operation compiles for 40 seconds, and gloo does not need it.
                operations.__compatible_ops__["deepspeed_shm_comm"] = False
        finally:
            for number, descriptor in zip((1, 2), descriptors, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


import_deepspeed()
# DeepSpeed warns of all optimizers that it does not know. Tests here show that torch's train
# correctly.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())

LIVE = 1_000_000_000
"""Gathered parameters of sharded layers at a time. This is DeepSpeed's default."""


PRECISIONS = ("bf16-true", "32-true")
"""bf16 weights with float32 masters, and float32."""


class ZeroPrecision(DeepSpeedPrecision):
    """Keeps the dtypes of batches (a target's weight is always float32).

    Lightning scales the loss.
    """

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


class Zero3(Sharded, DeepSpeedStrategy):
    """ZeRO-3 on GPUs or CPU processes.

    Args:
        frozen: "whole" keeps frozen parts on every rank, gathered once. "sharded" gathers them
            whenever they run.
        offload_optimizer, offload_parameters: null, "cpu" or "nvme" (with `nvme_path`).
        reduce_dtype: the dtype in which gradients are communicated and summed over micro-batches.
        masters: the dtype of the weights that the optimizer works on. With bf16 the optimizer
            writes the model's own weights. Only `stage.optim.moments=bf16` does so without losing
            small updates.
        zero: further keys of DeepSpeed's `zero_optimization` section.
        timeout_minutes: the time after which a collective call without all ranks is an error.
    """

    def __init__(
        self,
        frozen: str = "whole",
        offload_optimizer: str | None = None,
        offload_parameters: str | None = None,
        nvme_path: str | None = None,
        reduce_dtype: str = "fp32",
        masters: str = "fp32",
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
        if reduce_dtype not in ("fp32", "bf16"):
            raise UserError(f"trainer.strategy.reduce_dtype={reduce_dtype} must be fp32 or bf16")
        if masters not in ("fp32", "bf16"):
            raise UserError(f"trainer.strategy.masters={masters} must be fp32 or bf16")
        if masters == "bf16" and (reduce_dtype != "bf16" or offload_optimizer):
            raise UserError(
                "trainer.strategy.masters=bf16 needs gradients in bf16 on the GPU: set "
                "trainer.strategy.reduce_dtype=bf16 and no trainer.strategy.offload_optimizer"
            )
        self.frozen = frozen
        self.bf16_masters = masters == "bf16"
        self.masters: dict[str, Tensor] = {}
        """This rank's part of the unrounded weights, until masters can hold it."""
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
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW needs no compilation
        }
        if self.bf16_masters:
            config["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        super().__init__(config=config, timeout=timedelta(minutes=timeout_minutes), **options)

    # -- on CPU processes --------------------------------------------------------------------------

    @property
    def on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def root_device(self) -> torch.device:
        # Lightning passes the index on to DeepSpeed.
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    def setup_environment(self) -> None:
        if self.on_cpu:
            self.setup_distributed()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if self.on_cpu:
            self.set_world_ranks()
            self._process_group_backend = "gloo"
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    # -- precision ---------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Any:
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        if plugin is not None and plugin.precision not in PRECISIONS:
            raise UserError(f"trainer.precision={plugin.precision}: ZeRO-3 trains in {' or '.join(PRECISIONS)}")
        if plugin is not None and self.bf16_masters and plugin.precision != "bf16-true":
            raise UserError(
                f"trainer.strategy.masters=bf16 with trainer.precision={plugin.precision}: set trainer.precision="
                "bf16-true"
            )
        self._precision_plugin = ZeroPrecision(plugin.precision) if isinstance(plugin, DeepSpeedPrecision) else plugin

    # -- building ----------------------------------------------------------------------------------

    def model_sharded_context(self) -> AbstractContextManager[None]:
        return nullcontext()  # `placement` shards each parameter at once

    def placement(self) -> Partitioned:
        self._init_config_if_needed()
        dtype = torch.float32 if self.precision_plugin.precision == "32-true" else torch.bfloat16
        return Partitioned(self, dtype)

    @property
    def resumes(self) -> bool:
        """Whether a training checkpoint will provide the masters."""
        module: Any = self.lightning_module
        return bool(module.resumed)

    @torch.no_grad()
    def init_deepspeed(self) -> None:
        super().init_deepspeed()
        section = self.config["zero_optimization"]
        if self.optimizers and not {"offload_optimizer", "offload_param"} & section.keys():
            zero: Any = self.optimizers[0]
            for weights, masters in zip(
                zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
            ):
                # One copy is enough. DeepSpeed intends this too, but compares a device with its
                # name.
                if masters.dtype == weights.dtype:
                    masters.data = weights.data
        if not self.masters:
            return
        for name, parameter in self._sphinx.named_parameters():
            if name in self.masters:
                # DeepSpeed made the masters from rounded weights.
                self.local_weight(parameter).copy_(self.masters.pop(name))

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        if optimizer is not None:
            self.note_groups(optimizer)
        engine, zero = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if self.frozen == "whole" and hasattr(zero, "parameter_offload"):
            # Before an optimizer step DeepSpeed releases all gathered parameters, even frozen ones,
            # which no step changes.
            changing = Changing([p for p in self._sphinx.parameters() if p.requires_grad])
            coordinator = zero.parameter_offload.get_param_coordinator()
            zero._partition_all_parameters = lambda: coordinator.release_and_reset_all(changing)
        return engine, zero

    # -- what this rank holds ----------------------------------------------------------------------

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return whole_shape(parameter)

    def held(self, parameter: Any) -> tuple[int, int]:
        part = parameter.ds_tensor.ds_numel
        start = self.global_rank * part
        return min(start, parameter.ds_numel), min(start + part, parameter.ds_numel)

    def _in_flat(self, parameter: Any) -> tuple[int, slice]:
        """Return the index of DeepSpeed's flat buffer with this rank's part, and the part's place
        without padding."""
        buffer, offset, _ = self.optimizers[0].grad_position[self.optimizers[0].get_param_id(parameter)]
        start, stop = self.held(parameter)
        return buffer, slice(offset, offset + stop - start)

    def local_weight(self, parameter: Any) -> Tensor:
        if not parameter.requires_grad:
            start, stop = self.held(parameter)
            return parameter.ds_tensor[: stop - start]  # type: ignore[no-any-return]
        buffer, part = self._in_flat(parameter)
        return self.optimizers[0].fp32_partitioned_groups_flat[buffer].data[part]  # type: ignore[no-any-return]

    def local_states(self, parameter: Any) -> dict[str, Any]:
        buffer, part = self._in_flat(parameter)
        zero: Any = self.optimizers[0]
        states = zero.optimizer.state.get(zero.fp32_partitioned_groups_flat[buffer], {})
        return {k: v if k == STEP else v[part] for k, v in states.items() if isinstance(v, Tensor)}

    def allocate_states(self) -> None:
        """Run a step without gradients, and undo its effect on the weights."""
        zero: Any = self.optimizers[0]
        for number, buffer in enumerate(zero.fp32_partitioned_groups_flat):
            # Offloaded masters have their own gradient, which DeepSpeed writes to in each step.
            gradient, weights = buffer.grad, buffer.data.clone()
            buffer.grad = torch.zeros_like(buffer)
            zero._optimizer_step(number)
            buffer.data.copy_(weights)
            buffer.grad = gradient

    def restored(self) -> None:
        """Round the masters into the weights that modules compute with.

        Gathered weights are outdated.
        """
        zero: Any = self.optimizers[0]
        for buffer in range(len(zero.fp32_partitioned_groups_flat)):
            zero.fp16_partitioned_groups_flat[buffer].data.copy_(zero.fp32_partitioned_groups_flat[buffer].data)
            zero._unflatten_partitioned_parameters(buffer)
        for parameter in self._sphinx.parameters():
            parameter.partition(has_been_updated=False)  # type: ignore[attr-defined]


class Changing(nn.ParameterList):
    """The parameters that an optimizer step changes, as a module for DeepSpeed."""

    def ds_external_parameters(self) -> tuple[()]:
        return ()


class Partitioned:
    """Partitions each parameter as soon as it exists. The first rank knows its values.

    Under bf16 a rank keeps its part of the exact values, which its masters start from.
    """

    def __init__(self, strategy: Zero3, dtype: torch.dtype) -> None:
        from deepspeed import zero

        self.strategy = strategy
        self.dtype = dtype
        self.reads = strategy.is_global_zero
        self.device = strategy.root_device
        self.keeps_masters = dtype != torch.float32 and not strategy.bf16_masters and not strategy.resumes
        self.names: dict[nn.Parameter, str] = {}
        self._init: Any = zero.Init(module=nn.Module(), config_dict_or_path=strategy.config, dtype=dtype)

    def prepare(self, model: Sphinx) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        if self.strategy.frozen == "whole":
            # Frozen parameters count as live, and would leave no room for those that are gathered
            # in turn.
            frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
            section = self.strategy.config["zero_optimization"]
            section.setdefault("stage3_max_live_parameters", LIVE + frozen)

    def put(self, owner: nn.Module, name: str, value: Tensor | None) -> None:
        like = owner.get_parameter(name)
        device = self.device
        keeps = like.requires_grad and self.keeps_masters
        data = torch.empty(like.shape, dtype=torch.float32 if keeps else self.dtype, device=device)
        if value is not None:
            data.copy_(value)
        if keeps:
            dist.broadcast(data, 0)
            whole, data = data, data.to(self.dtype)
        parameter = nn.Parameter(data, requires_grad=like.requires_grad)
        setattr(owner, name, parameter)
        # it sends the first rank's values and keeps this rank's part
        self._init._convert_to_zero_parameters([parameter])
        if keeps:
            start, stop = self.strategy.held(parameter)
            where = "cpu" if "offload_optimizer" in self.strategy.config["zero_optimization"] else device
            self.strategy.masters[self.names[like]] = whole.view(-1)[start:stop].to(where, copy=True)
        if not like.requires_grad and self.strategy.frozen == "whole":
            parameter.ds_persist = True  # type: ignore[attr-defined]  # it stays gathered after its first use
