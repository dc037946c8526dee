"""FSDP2 (Zhao et al. 2023; PyTorch's `fully_shard`) as a Lightning strategy.

A rank holds some rows of every matrix in float32, and gathers a block in bf16 while it computes.
The strategy is Lightning's ModelParallelStrategy with one dimension (data parallelism), and with
the checkpoints of `sphinx_pl.checkpoints.training`.
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
    """FSDP2 with bf16 computation. See the module's docstring.

    Args:
        compute_dtype: the dtype of weights and activations during computation: bf16 or fp32.
        reduce_dtype: the dtype in which gradients are communicated.
        frozen: "whole" keeps frozen parts on every rank, in `compute_dtype`. "sharded" gathers them
            whenever they run.
        timeout_minutes: the time after which a collective call without all ranks is an error.
    """

    def __init__(
        self,
        compute_dtype: str = "bf16",
        reduce_dtype: str = "fp32",
        frozen: str = "whole",
        timeout_minutes: float = 30,
        **options: Any,
    ) -> None:
        for key, value, names in (
            ("compute_dtype", compute_dtype, DTYPES),
            ("reduce_dtype", reduce_dtype, DTYPES),
            ("frozen", frozen, ("whole", "sharded")),
        ):
            if value not in names:
                raise UserError(f"trainer.strategy.{key}={value}: {suggest(value, list(names))}")
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
        # `ranks.join` runs before the model exists, which Lightning needs
        if self.lightning_module is None:
            self._setup_distributed()
        else:
            super().setup_environment()

    def placement(self) -> RowPlacement:
        return RowPlacement(self)

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        self.note_groups(self.optimizers[0])

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    # -- what this rank holds ----------------------------------------------------------------------

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        # every rank holds all of it: the first rank writes it, all read it
        if not isinstance(parameter, DTensor):
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
        """Run a step without gradients, and undo its effect on the weights."""
        for parameter in self._sphinx.parameters():
            if not parameter.requires_grad:
                continue
            weights = self.local_weight(parameter).clone()
            parameter.grad = torch.zeros_like(parameter)
            self.optimizers[0].step()
            parameter.grad = None
            self.local_weight(parameter).copy_(weights)

    def restored(self) -> None:
        pass


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class RowPlacement:
    """Shards blocks of the decoder and of trained encoders one by one, and the rest together."""

    def __init__(self, strategy: Fsdp2) -> None:
        self.strategy = strategy
        self.reads = strategy.is_global_zero
        self.device = strategy.root_device
        self.dtype = strategy.compute_dtype
        self.mesh = init_device_mesh(self.device.type, (strategy.world_size,))

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
        # A stage calls these methods. Calls of other methods do not run the hooks that gather
        # parameters.
        for method in ("token_losses", "embed_images"):
            register_fsdp_forward_method(model, method)

    def put(self, owner: nn.Module, name: str, value: Tensor | None) -> None:
        like = owner.get_parameter(name)
        device = self.device
        sharded = isinstance(like, DTensor)
        dtype = like.dtype if sharded else self.strategy.compute_dtype
        data = torch.empty(like.shape, dtype=dtype, device=device)
        if value is not None:
            data.copy_(value)
        if isinstance(like, DTensor):  # it sends each rank its rows
            data = distribute_tensor(data, like.device_mesh, like.placements)
        else:
            dist.broadcast(data, 0)
        torch.utils.swap_tensors(like, nn.Parameter(data, requires_grad=like.requires_grad))  # type: ignore[no-untyped-call]


def _units(model: Sphinx) -> Iterable[nn.Module]:
    """Return the modules that are gathered one at a time, in the order of the forward pass."""
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
