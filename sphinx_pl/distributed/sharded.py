"""The common part of strategies under which a rank holds only a part of the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sphinx_pl.checkpoints.training import WEIGHT, TensorShard, TrainingShards, write_rest, write_shards
from sphinx_pl.distributed.checkpointing import STEP, group_names, options_of
from sphinx_pl.runtime.collectives import of_all_ranks
from sphinx_pl.utils.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as Base

    from sphinx_pl.models.placement import Placement
    from sphinx_pl.models.sphinx import Sphinx
else:
    Base = object


class Sharded(Base):
    """A mixin for strategies: each rank writes and reads its part of a training checkpoint."""

    optimizer_names: list[list[str]]
    """The optimizer's groups, as names of parameters."""
    _shards: TrainingShards | None = None
    bf16_masters = False
    """Whether the optimizer works on weights in bf16."""

    @abstractmethod
    def placement(self) -> Placement:
        """Return the placement of the parameters of a model that is being built."""

    @abstractmethod
    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return this rank's elements [start, stop) of the flattened parameter."""

    @abstractmethod
    def local_weight(self, parameter: nn.Parameter) -> Tensor:
        """Return those elements as the optimizer works on them (flat, writable)."""

    @abstractmethod
    def local_states(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the optimizer's states of those elements (flat, writable), and its `step`."""

    @abstractmethod
    def restored(self) -> None:
        """Update what depends on local weights and states, after all of them were written."""

    @abstractmethod
    def allocate_states(self) -> None:
        """Create the optimizer's states, which it would create only in its first step."""

    @property
    def _sphinx(self) -> Sphinx:
        module: Any = self.lightning_module
        return module.sphinx  # type: ignore[no-any-return]

    # -- writing -----------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a training checkpoint from all ranks.

        Raises:
            UserError: one of the ranks could not write. All ranks raise it.
        """
        folder = Path(self.broadcast(str(filepath)))
        if self.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
        self.barrier()
        self._on_all(folder, lambda: write_shards(folder, self.global_rank, self.world_size, self._local_shards()))
        # The index names the size of every rank's file.
        self._on_all(folder, lambda: self._write_rest(checkpoint, folder) if self.is_global_zero else None)

    def _on_all(self, folder: Path, write: Callable[[], None]) -> None:
        """Let every rank write.

        Raises:
            UserError: on all ranks, if one of them could not.
        """
        error = ""
        try:
            write()
        except OSError as failure:
            error = f"rank {self.global_rank} cannot write to '{folder}': {failure}"
        if errors := [message for message in of_all_ranks(error, self.world_size) if message]:
            raise UserError(f"{errors[0]}: free some space, or repair the disk; earlier checkpoints are untouched")

    def _write_rest(self, checkpoint: dict[str, Any], folder: Path) -> None:
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        rest["optimizer_groups"] = options_of(self.optimizers[0].param_groups)
        rest["optimizer_steps"] = {
            name: float(states[STEP])
            for name, parameter in self._sphinx.named_parameters()
            if parameter.requires_grad and STEP in (states := self.local_states(parameter))
        }
        shapes = {name: self.shape(parameter) for name, parameter in self._sphinx.named_parameters()}
        write_rest(folder, self.world_size, shapes, rest)

    @abstractmethod
    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of the whole parameter."""

    def _local_shards(self) -> Iterator[TensorShard]:
        for name, parameter in self._sphinx.named_parameters():
            start, stop = self.held(parameter)
            # the first rank writes what all ranks hold
            if stop <= start or (start == 0 and not self.is_global_zero):
                continue
            yield TensorShard(WEIGHT, name, start, self.local_weight(parameter))
            for kind, values in self.local_states(parameter).items() if parameter.requires_grad else ():
                if kind != STEP:
                    yield TensorShard(kind, name, start, values)

    # -- reading -----------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._shards = TrainingShards(Path(checkpoint_path))
        return self._shards.state() | {"optimizer_states": [{}]}  # Lightning expects this key

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self._shards is not None
        for name, parameter in self._sphinx.named_parameters():
            start, stop = self.held(parameter)
            if start < stop:
                self.local_weight(parameter).copy_(self._shards.read(name, start, stop))
        self.restored()

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        shards = self._shards
        assert shards is not None
        [optimizer] = self.optimizers
        for group, options in zip(optimizer.param_groups, checkpoint["optimizer_groups"], strict=True):
            group.update(options)
        steps = checkpoint["optimizer_steps"]
        if steps or shards.kinds():
            self.allocate_states()
        for name, parameter in self._sphinx.named_parameters():
            if not parameter.requires_grad:
                continue
            start, stop = self.held(parameter)
            for kind, values in self.local_states(parameter).items():
                if kind == STEP:
                    values.fill_(steps[name])
                elif start < stop:
                    values.copy_(shards.read(name, start, stop, kind))
        self._shards = None

    def note_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the names in the optimizer's groups before the engine replaces its tensors."""
        self.optimizer_names = group_names(self._sphinx, [optimizer])
