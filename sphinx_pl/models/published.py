"""Our name of a tensor -> where its value stands in files that others publish."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours comes from: names in their files, and how their values make it."""

    names: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of what `make` gives for the shapes of `names`; the first if they do not fit."""
        try:
            return tuple(self.make(*(torch.empty(shape, device="meta") for shape in shapes)).shape)
        except (RuntimeError, IndexError):
            return tuple(shapes[0])


@dataclass(frozen=True)
class PublishedLayout:
    """One way in which a kind of encoder is published.

    Args:
        name: for messages.
        source: (our name, encoder) -> their names.
        unused: regular expressions for what their files hold beyond the encoder, such as a text
            encoder or a classifier.
    """

    name: str
    source: Callable[[str, Any], Source]
    unused: tuple[str, ...] = ()

    def leaves_out(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


@dataclass(frozen=True)
class OriginalNames:
    """Names of an encoder's tensors in released SPHINX weights (`sphinx_pl.checkpoints.original`).

    Args:
        theirs: what their names begin with.
        ours: what stands there in ours.
        renamed: parts of names, (theirs, ours).
        unused: shapes of tensors that their files have and no forward pass uses.
        config: keys of the encoder's configuration that the original's inference sets.
        note: what a reader of the weights has to know about `config`.
    """

    theirs: str
    ours: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    unused: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Names:
    """Names of a transformer's tensors, ours -> theirs, whole or by what stands before `.weight`."""

    top: Mapping[str, str]
    block: str
    parts: Mapping[str, str]

    def __call__(self, name: str) -> str:
        if match := re.search(r"(?:blocks|layers)\.(\d+)\.(.+)", name):
            return f"{self.block}.{match[1]}.{_renamed(match[2], self.parts)}"
        return _renamed(name, self.top)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    stem, _, leaf = name.rpartition(".")
    return table[name] if name in table else f"{table[stem]}.{leaf}"


def own_name(name: str, encoder: Any) -> Source:
    """The files use our names."""
    return Source((name,))


def behind(prefix: str) -> Callable[[str, Any], Source]:
    """`model.x` of ours is `<prefix>x` of theirs."""
    return lambda name, encoder: Source((prefix + name.removeprefix("model."),))


def same(tensor: Tensor) -> Tensor:
    return tensor


def joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


OURS = PublishedLayout("ours", own_name)

HUB = "hf-hub:"
"""What stands before OWNER/NAME of a model on the Hugging Face hub."""
