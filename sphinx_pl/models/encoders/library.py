"""Encoders that another library builds by name or by its own configuration.

Each of them has its own image size, normalisation, layer and tokens. Sizes are measured: a forward
pass without memory, on the meta device, gives the number of tokens, their width and the FLOPs.
"""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.flop_counter import FlopCounterMode

from sphinx_pl.models.checks import positive, require
from sphinx_pl.models.encoders.base import ENCODERS, Encoder, EncoderConfig, ViewScheme
from sphinx_pl.utils.errors import UserError, suggest

PREFIXES = ("class", "all", "none")


@dataclass
class LibraryConfig(EncoderConfig):
    """The keys that all libraries' encoders have.

    `image_size: 0` and null `mean` and `std` stand for the values that the library has for the
    model. `layer` is the block (or stage) whose output is read, counted from the end if negative;
    null reads the model's final features. `norm` applies the final norm to an earlier layer.
    `prefix` says which tokens without a place stand before the patches: the `class` token, `all`
    (with registers) or `none`. By channel, one token always stands there: the class token, else the
    mean of the patches.
    """

    image_size: int = 0
    name: str = ""
    mean: Optional[list[float]] = None
    std: Optional[list[float]] = None
    layer: Optional[int] = None
    norm: bool = False
    prefix: str = "class"

    def __post_init__(self) -> None:
        positive(self.section, self, *(["image_size"] if self.image_size else []))
        require(self.prefix in PREFIXES, f"{self.section}.prefix='{self.prefix}': {suggest(self.prefix, PREFIXES)}")
        require(
            not self.norm or self.layer is not None,
            f"{self.section}.norm=true needs a layer: without one, the final features are as the library gives them",
        )
        self.resolve()
        for name in ("mean", "std"):
            values = getattr(self, name)
            require(bool(values) and len(values) == 3, f"{self.section}.{name}={values} must be three numbers")
        require(min(self.std or [1]) > 0, f"{self.section}.std={self.std} must be positive")
        require(
            not (self.by_channel and self.prefix == "all"),
            f"{self.section}.prefix=all needs {self.section}.join=sequence: by channel, one token stands for the class",
        )

    def resolve(self) -> None:
        """Fill in what the library knows of the model: the image size and the normalisation.

        Raises:
            UserError: the library has no such model.
        """
        raise NotImplementedError

    @property
    def measured(self) -> Measured:
        """What a forward pass tells."""
        return measure(self)

    @property
    def width(self) -> int:
        return self.measured.width

    @property
    def grid(self) -> int:
        return self.measured.grid

    @property
    def tokens(self) -> int:
        return self.measured.tokens


@dataclass(frozen=True)
class Measured:
    """Facts about an encoder.

    `unused` has the parameters on which the tokens do not depend, `flops` is that of one view.
    """

    width: int
    grid: int
    tokens: int
    flops: float
    unused: frozenset[str]


_MEASURED: dict[str, Measured] = {}


def measure(config: LibraryConfig) -> Measured:
    """Run an encoder without memory, once for each configuration.

    Raises:
        UserError: it cannot be built or run so, or its features are not a square map.
    """
    free = ("load", "mean", "std", "key", "resampler")
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    text = json.dumps([config.kind, config.by_channel, values], sort_keys=True, default=str)
    if text not in _MEASURED:
        _MEASURED[text] = _measure(config)
    return _MEASURED[text]


def _measure(config: LibraryConfig) -> Measured:
    kind = ENCODERS[config.kind]
    assert issubclass(kind, LibraryEncoder)
    model = constructed(kind, config, meta=True).to("meta").eval().requires_grad_(True)
    parameters = dict(model.named_parameters())
    size = config.image_size
    views = torch.empty(1, 3, size, size, device="meta")
    with torch.enable_grad():
        try:
            prefix, patches = kind.features(model, config, views)
        except UserError:
            raise
        except Exception as error:  # of many models
            raise UserError(f"{config.section}: it cannot run on images of {size} pixels ({reason(error)})") from error
        tokens = with_prefix(config, prefix, patches, kind.has_class_token(model))
        gradients = torch.autograd.grad(tokens.sum(), list(parameters.values()), allow_unused=True)
    unused = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}
    prune(model, unused)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        kind.features(model, config, views)
    grid = round(patches.shape[1] ** 0.5)
    require(
        grid**2 == patches.shape[1],
        f"{config.section}: {config.name} gives {patches.shape[1]} patches, which are no square map",
    )
    flops = float(counter.get_total_flops())
    return Measured(tokens.shape[2], grid, tokens.shape[1], flops, frozenset(unused))


def with_prefix(config: LibraryConfig, prefix: Tensor, patches: Tensor, has_class: bool) -> Tensor:
    """The encoder's tokens: patches behind those that are chosen of `prefix`, [N, P, C]."""
    if config.by_channel:
        chosen = prefix[:, :1] if config.prefix == "class" and has_class else patches.mean(dim=1, keepdim=True)
    else:
        chosen = prefix[:, : {"class": int(has_class), "all": prefix.shape[1], "none": 0}[config.prefix]]
    return torch.cat([chosen, patches], dim=1)


def flat(features: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, h * w, C]."""
    return features.flatten(2).transpose(1, 2)


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """New modules have parameters on the meta device, and buffers with values.

    Tables such as rotary angles are computed by constructors, and no file holds them.
    """

    def hook(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
    try:
        with torch.device("cpu"):
            yield
    finally:
        handle.remove()


def reason(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def constructed(kind: type[LibraryEncoder], config: LibraryConfig, meta: bool) -> nn.Module:
    """The library's model, with new weights or without memory.

    Raises:
        UserError: the library refuses the configuration.
    """
    try:
        if not meta:
            return kind.construct(config)
        with parameters_without_memory():
            return kind.construct(config)
    except UserError:
        raise
    except Exception as error:  # of many libraries and models
        raise UserError(
            f"{config.section}: {config.kind} cannot build {config.name or 'this model'} ({reason(error)})"
        ) from error


class Unused(nn.Module):
    """It stands where the library's forward pass calls a part whose result is not read."""

    def forward(self, x: Any, *others: Any, **options: Any) -> Any:
        return x


def prune(model: nn.Module, unused: Iterable[str]) -> None:
    """Remove parameters, and whole modules that have no others."""
    names = set(unused)

    def visit(module: nn.Module, path: str) -> None:
        for name, child in list(module.named_children()):
            own = {f"{path}{name}.{parameter}" for parameter, _ in child.named_parameters()}
            if own and own <= names:
                setattr(module, name, Unused())
            elif own & names:
                visit(child, f"{path}{name}.")
        for name in [name for name in module._parameters if f"{path}{name}" in names]:
            setattr(module, name, None)

    visit(model, "")


def keep_constants(model: nn.Module) -> None:
    """Make the statistics of norms parameters without gradients.

    So they are placed, sharded, read and written like every tensor of a model. Other buffers are in
    no checkpoint.
    """
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            if name == "num_batches_tracked":
                module._buffers[name] = None
            elif buffer.is_floating_point():
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
            else:
                module._non_persistent_buffers_set.add(name)


def _compute_tables(kind: type[LibraryEncoder], config: LibraryConfig, model: nn.Module) -> None:
    """Fill buffers that are computed where the weights are; the model is built whole for them."""
    with torch.device("cpu"):
        tables = dict(constructed(kind, config, meta=False).named_buffers())
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = tables[f"{path}.{name}".lstrip(".")]


class LibraryEncoder(Encoder):
    """The library's own modules, without those that its tokens do not depend on.

    It is in eval mode while it trains, too. Norms use their running statistics, which stay as they
    are, and nothing is random (dropout, jittered positions): a run does not depend on how ranks
    divide images, and repeats exactly.
    """

    config: LibraryConfig
    model: nn.Module

    def __init__(self, config: LibraryConfig, scheme: ViewScheme | None = None) -> None:
        super().__init__(config, scheme)
        assert config.mean is not None
        assert config.std is not None
        self.mean = (config.mean[0], config.mean[1], config.mean[2])
        self.std = (config.std[0], config.std[1], config.std[2])
        meta = torch.get_default_device().type == "meta"
        model = constructed(type(self), config, meta)
        names = set(model.state_dict())
        prune(model, config.measured.unused)
        if meta and any(buffer.is_meta for buffer in model.buffers()):
            _compute_tables(type(self), config, model)
        if meta:
            with parameters_without_memory():
                keep_constants(model)
        else:
            keep_constants(model)
        self.model = model
        self.has_class = self.has_class_token(model)
        self.removed = frozenset(names - set(model.state_dict()))
        """Tensors of the library's model that the encoder does without."""

    @classmethod
    @abstractmethod
    def construct(cls, config: Any) -> nn.Module:
        """The library's model for this configuration."""

    @classmethod
    @abstractmethod
    def features(cls, model: Any, config: Any, views: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, s, s] -> tokens without a place [N, P, C], class token first; patches [N, g*g, C]."""

    @classmethod
    @abstractmethod
    def has_class_token(cls, model: Any) -> bool:
        """Whether the first of the tokens without a place is that of the class."""

    def encode(self, views: Tensor) -> Tensor:
        prefix, patches = self.features(self.model, self.config, views)
        return with_prefix(self.config, prefix, patches, self.has_class)

    def train(self, mode: bool = True) -> LibraryEncoder:
        return super().train(False)

    def blocks(self) -> Iterable[nn.Module]:
        """Members of lists of equal modules."""

        def visit(module: nn.Module) -> Iterator[nn.Module]:
            children = [child for child in module.children() if any(True for _ in child.parameters())]
            listed = isinstance(module, nn.ModuleList | nn.Sequential) and len(children) > 1
            if listed and len({type(child) for child in children}) == 1:
                yield from children
                return
            for child in children:
                yield from visit(child)

        return visit(self.model)

    def flops(self) -> float:
        return self.config.measured.flops
