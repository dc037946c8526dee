"""FSDP2 (Zhao et al. 2023; PyTorch's `fully_shard`): a rank holds some rows of every matrix in float32, and gathers a
block while it computes, in bf16.

Lightning's ModelParallelStrategy with one dimension, data parallelism, and the checkpoints of
`sphinx_pl.checkpoints.training`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from sphinx_pl.distributed.checkpointing import STEP
from sphinx_pl.distributed.sharded import Sharded
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError, suggest

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Fsdp2(Sharded, ModelParallelStrategy):
    """See the module's description.

    Args:
        compute_dtype: of weights and activations while they compute: bf16 or fp32.
        reduce_dtype: of gradients on the wire.
        frozen: "whole" keeps frozen parts on every rank, in `compute_dtype`; "sharded" gathers them whenever they run.
        timeout_minutes: after which a collective call without all ranks is an error.
    """

    def __init__(
        self,
        compute_dtype: str = "bf16",
        reduce_dtype: str = "fp32",
        frozen: str = "whole",
        timeout_minutes: float = 30,
        **options: Any,
    ) -> None:
        for key, value, known in (
            ("compute_dtype", compute_dtype, DTYPES),
            ("reduce_dtype", reduce_dtype, DTYPES),
            ("frozen", frozen, ("whole", "sharded")),
        ):
            if value not in known:
                raise UserError(f"trainer.strategy.{key}={value}: {suggest(value, list(known))}")
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            timeout=timedelta(minutes=timeout_minutes),
            **options,
        )
        self.compute_dtype = DTYPES[compute_dtype]
        self.reduce_dtype = DTYPES[reduce_dtype]
        self.frozen = frozen

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.lightning_module is None:  # `processes.join`: Lightning's needs a model, which is not there yet
            self._setup_distributed()
        else:
            super().setup_environment()

    def placement(self) -> Rows:
        return Rows(self)

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        self.note_groups(self.optimizers[0])

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    # -- what this rank holds ---------------------------------------------------------------------------------------

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        if not isinstance(parameter, DTensor):  # whole on every rank: the first one writes it, all read it
            return 0, parameter.numel()
        rows = -(-parameter.shape[0] // self.world_size)
        row = parameter.numel() // max(parameter.shape[0], 1)
        start = min(self.global_rank * rows, parameter.shape[0])
        return start * row, min(start + rows, parameter.shape[0]) * row

    def local_weight(self, parameter: nn.Parameter) -> Tensor:
        return _local(parameter.data).view(-1)

    def local_states(self, parameter: nn.Parameter) -> dict[str, Any]:
        states = self.optimizers[0].state.get(parameter, {})
        return {k: v if k == STEP else _local(v).view(-1) for k, v in states.items() if isinstance(v, Tensor)}

    def allocate_states(self) -> None:
        """By a step without gradient, whose effect on the weights is undone."""
        for parameter in self._sphinx.parameters():
            if not parameter.requires_grad:
                continue
            kept = self.local_weight(parameter).clone()
            parameter.grad = torch.zeros_like(parameter)
            self.optimizers[0].step()
            parameter.grad = None
            self.local_weight(parameter).copy_(kept)

    def restored(self) -> None:
        pass


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Rows:
    """Blocks of the decoder and of towers that train are sharded one by one, and what is left together."""

    def __init__(self, strategy: Fsdp2) -> None:
        self.strategy = strategy
        self.reads = strategy.is_global_zero
        device = strategy.root_device
        self.mesh = init_device_mesh(device.type, (strategy.world_size,))

    def prepare(self, model: Sphinx) -> None:
        strategy = self.strategy
        whole = set()
        if strategy.frozen == "whole":
            whole = {p for p in model.parameters() if not p.requires_grad}
        policy = MixedPrecisionPolicy(param_dtype=strategy.compute_dtype, reduce_dtype=strategy.reduce_dtype)
        for module in _units(model):
            if not all(p in whole for p in module.parameters()):
                fully_shard(module, mesh=self.mesh, mp_policy=policy, ignored_params=whole)
        fully_shard(model, mesh=self.mesh, mp_policy=policy, ignored_params=whole)
        # What a stage calls; calls of other methods don't reach the hooks that gather parameters.
        for method in ("token_losses", "embed_images"):
            register_fsdp_forward_method(model, method)

    def put(self, owner: nn.Module, name: str, value: Tensor | None) -> None:
        like = owner.get_parameter(name)
        device = self.strategy.root_device
        sharded = isinstance(like, DTensor)
        dtype = like.dtype if sharded else self.strategy.compute_dtype
        data = torch.empty(like.shape, dtype=dtype, device=device)
        if value is not None:
            data.copy_(value)
        if isinstance(like, DTensor):  # sends each rank its rows
            data = distribute_tensor(data, like.device_mesh, like.placements)
        else:
            dist.broadcast(data, 0)
        torch.utils.swap_tensors(like, nn.Parameter(data, requires_grad=like.requires_grad))  # type: ignore[no-untyped-call]


def _units(model: Sphinx) -> Iterable[nn.Module]:
    """Modules that are gathered one at a time, in the order of the forward pass."""
    if model.vision is not None:
        for encoder in model.vision.encoders.values():
            yield from encoder.blocks()
            yield encoder
        yield model.vision
    yield model.decoder.tok_embeddings
    yield from model.decoder.layers
    yield model.decoder.norm
    if model.decoder.output is not None:
        yield model.decoder.output
