"""Builds a model one tensor at a time, where the tensor will live.

No process ever holds the whole model.

Every rank makes the same modules without memory (on the meta device). Then one process after
another gets the value of each parameter (it reads or draws it). A `Placement` puts the value where
it belongs: whole on this device, or a part on each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sphinx_pl.checkpoints.format import Checkpoint, open_checkpoint
from sphinx_pl.checkpoints.grown import grown
from sphinx_pl.checkpoints.native import released_values
from sphinx_pl.checkpoints.tensors import ENCODER_PREFIX, encoder_of
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.decoder import new_weight
from sphinx_pl.models.encoders.base import EncoderConfig
from sphinx_pl.models.placement import Placement
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.models.vision import build_encoder, build_resampler

RESAMPLER_PREFIX = "mixer.resamplers."
"""The prefix of the names of the resamplers' tensors."""


def build_model(
    config: SphinxConfig, frozen: Iterable[str], placement: Placement, weights: Checkpoint | None, resumed: bool = False
) -> Sphinx:
    """Return a model of which each process holds the part that `placement` assigns to it.

    Args:
        frozen: parts without gradients.
        weights: the initial weights. None reads the `load` entries of the decoder and the encoders
            and draws the rest from torch's CPU generator. So the numbers do not depend on the
            device or on the ranks.
        resumed: whether a training checkpoint brings the values later, so that none is read or
            drawn.

    Raises:
        UserError: `weights` has other names or shapes.
    """
    with torch.device("meta"):
        model = Sphinx(config)
    names = [name for name, _ in model.named_parameters()]
    assert set(model.state_dict()) == set(names), "a buffer that checkpoints hold has no place"
    if weights is not None:
        weights.check(model)
    model.freeze(frozen)
    placement.prepare(model)
    value: Callable[[str], Tensor] | None = None
    if placement.reads and not resumed:
        value = weights.tensor if weights is not None else Fresh(config)
    with torch.no_grad():
        for name in names:
            owner, _, own = name.rpartition(".")
            placement.put(model.get_submodule(owner), own, value(name) if value else None)
    for module in model.modules():  # tables that constructors compute
        for name, buffer in module._buffers.items():
            if buffer is not None:
                dtype = placement.dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = buffer.to(placement.device, dtype)
    return model


class Fresh:
    """The values of a new model by name: released weights where the configuration names them, else
    drawn ones.

    If the values are asked for in the model's own order, it holds one decoder matrix or one encoder
    at a time.
    """

    def __init__(self, config: SphinxConfig) -> None:
        self.config = config
        with torch.device("meta"):
            self.model = Sphinx(config)
        load = config.decoder.load
        self._decoder = grown(open_checkpoint(load), config.decoder.vocab_size) if load else None
        self._module = ""
        self._values: Callable[[str], Tensor] = lambda name: torch.empty(0)

    def __call__(self, name: str) -> Tensor:
        if name.startswith("decoder."):
            if self._decoder is not None:
                return self._decoder.tensor(name)
            return new_weight(name, torch.empty(self.model.get_parameter(name).shape), self.config.decoder)
        if name.startswith(ENCODER_PREFIX):
            key = encoder_of(name)
            module = ENCODER_PREFIX + key
            make: Callable[[], Callable[[str], Tensor]] = lambda: self._encoder(key)  # noqa: E731
        elif name.startswith(RESAMPLER_PREFIX):
            key = name.removeprefix(RESAMPLER_PREFIX).split(".")[0]
            module = RESAMPLER_PREFIX + key
            make = lambda: build_resampler(self._section(key)).get_parameter  # noqa: E731
        else:
            module = name.rpartition(".")[0]
            if module == "mixer":  # the start, end and skip embeddings
                return torch.randn(self.model.get_parameter(name).shape) * 0.02
            make = lambda: _reset(self.model.get_submodule(module))  # noqa: E731
        if module != self._module:
            self._values = make()
            self._module = module
        return self._values(name.removeprefix(f"{module}."))

    def _section(self, key: str) -> EncoderConfig:
        assert self.config.vision is not None
        section: EncoderConfig = self.config.vision.encoders[key]
        return section

    def _encoder(self, key: str) -> Callable[[str], Tensor]:
        assert self.config.vision is not None
        if self._section(key).load:
            value = released_values(self.config, key)
            return lambda name: value(f"{ENCODER_PREFIX}{key}.{name}")
        return build_encoder(self.config.vision, key).get_parameter


def _reset(module: nn.Module) -> Callable[[str], Tensor]:
    """Return the parameters of a small PyTorch module, as the module itself draws them."""
    module.to_empty(device="cpu")
    module.reset_parameters()  # type: ignore[operator]
    return module.get_parameter
