"""Writes and reads Lightning's checkpoints as our training checkpoints
(`sphinx_pl.checkpoints.training`).

If a process holds the whole model, `TrainingCheckpointIO` does this. A `Sharded` strategy writes
and reads the parts of its ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from sphinx_pl.checkpoints.training import WEIGHT, TensorShard, TrainingShards, write_rest, write_shards

PREFIX = "model."
"""The prefix of the model's names in the state dict of the module that trains it."""
STEP = "step"
"""The optimizer's name for its counter, which is a number and not a tensor."""


def group_names(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[list[str]]:
    """Return the names of the parameters in each of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for optimizer in optimizers for group in optimizer.param_groups]


def options_of(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of an optimizer's groups, without their parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


class TrainingCheckpointIO(TorchCheckpointIO):
    """One process writes the whole model as the pieces of one rank.

    Each process reads all of it, whoever wrote it.

    Files of the base class carry the weights back from ranks that Lightning forked.
    """

    failure: OSError | None = None
    """The error of the last checkpoint, if it could not be written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        An error of the disk is stored as `failure`, since the other ranks wait for this one.
        """
        self.failure = None
        if "loops" not in checkpoint:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            self._save(checkpoint, Path(path))
        except OSError as error:
            self.failure = error

    def _save(self, checkpoint: dict[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rest = dict(checkpoint)
        weights = {name.removeprefix(PREFIX): value for name, value in rest.pop("state_dict").items()}
        optimizers = rest.pop("optimizer_states")
        names = [name for group in rest["optimizer_names"] for name in group]
        rest["optimizer_groups"] = [group for state in optimizers for group in options_of(state["param_groups"])]
        states = dict(zip(names, (s for state in optimizers for _, s in sorted(state["state"].items())), strict=False))
        rest["optimizer_steps"] = {name: float(state[STEP]) for name, state in states.items() if STEP in state}
        write_shards(folder, 0, 1, self._shards(weights, states))
        write_rest(folder, 1, {name: value.shape for name, value in weights.items()}, rest)

    @staticmethod
    def _shards(weights: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]]) -> Iterator[TensorShard]:
        for name, value in weights.items():
            yield TensorShard(WEIGHT, name, 0, value.detach().flatten())
        for name, state in states.items():
            for kind, value in state.items():
                if kind != STEP and isinstance(value, Tensor):
                    yield TensorShard(kind, name, 0, value.flatten())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if Path(path).is_file():
            content: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
            return content
        shards = TrainingShards(Path(path))
        checkpoint = shards.state()
        shapes = shards.shapes
        checkpoint["state_dict"] = {PREFIX + name: shards.read(name).view(shapes[name]) for name in shapes}
        names, groups = checkpoint.pop("optimizer_names"), checkpoint.pop("optimizer_groups")
        steps, kinds = checkpoint.pop("optimizer_steps"), shards.kinds()
        state: dict[int, dict[str, Any]] = {}
        param_groups = []
        for own, options in zip(names, groups, strict=True):
            first = len(state)
            for name in own:
                state[len(state)] = {
                    kind: shards.read(name, kind=kind).view(shapes[name]) for kind in kinds if shards.has(name, kind)
                } | ({STEP: torch.tensor(steps[name])} if name in steps else {})
            param_groups.append({**options, "params": list(range(first, len(state)))})
        checkpoint["optimizer_states"] = [
            {"state": {i: values for i, values in state.items() if values}, "param_groups": param_groups}
        ]
        return checkpoint
