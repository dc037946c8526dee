"""The two records that the parts of the project exchange, and what lies between them.

source -> `Record` -> task template -> `Sample` -> mixture and packer -> `Batch` -> model

A `Record` is what a data set says, in pixels of the original image. A `Sample` is what the model reads, in
token ids. A `Batch` is what a training step gets. The model knows nothing of records, the data nothing of modules.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position without supervision."""
PLACEHOLDER = "<image>"
"""The mark of an image's place in a question."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an encoded image lies: a whole file, or `size` bytes at `offset` of a tar shard. Not decoded yet.

    What is made of it once it is decoded and upright, before it is padded: `crop` cuts out (x1, y1, x2, y2) in pixels,
    then `flip` mirrors left and right. `annotated` is the (width, height) of the image that coordinates are about, the
    crop's too: decoding compares it with the pixels (`sphinx_pl.data.images.load_image`). None: nothing is compared.
    """

    path: str
    offset: int = 0
    size: int = -1
    crop: tuple[int, int, int, int] | None = None
    flip: bool = False
    annotated: tuple[int, int] | None = field(default=None, compare=False)  # it is the same image with and without

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageRef:
        """The reference that `dataclasses.asdict` gave, also by way of JSON, which makes lists of tuples."""
        lists = {name: tuple(values[name]) for name in ("crop", "annotated") if values.get(name)}
        return cls(**{**values, **lists})


@dataclass(frozen=True, slots=True)
class Region:
    """A labelled box in pixels of the original image, (x1, y1) top left, (x2, y2) bottom right.

    `keypoints`: (x, y, visibility) in pixels, in COCO's order for a person (visibility 0: absent, 1: hidden, 2: seen).
    """

    box: tuple[float, float, float, float]
    label: str = ""
    keypoints: tuple[tuple[float, float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer. `<image>` in a question marks an image's place."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Record:
    """One annotated item of a source, before any instruction wording is chosen.

    Which of the fields a record needs depends on its task (`sphinx_pl.data.tasks`): a task with free text has
    `turns`; one with geometry has `regions` in pixels and the task writes the text.
    """

    key: str  # unique within its source, stable over runs
    task: str  # name in the task registry
    images: tuple[ImageRef, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of each image; () where the source does not say
    turns: tuple[Turn, ...] = ()
    system: str | None = None  # the text before its first turn; None: the processor's
    question: str = ""
    answer: str = ""
    choices: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=Counter)  # see `Sample`


@dataclass(slots=True)
class Branch:
    """One conversation over a sample's shared prefix (bos, images, system text)."""

    ids: list[int]
    supervised: list[bool]  # True where this id is a target
    task: str
    key: str


@dataclass(slots=True)
class Sample:
    """A tokenized item whose length is known before its images are decoded.

    `prefix` is shared by all branches: BOS, image slots (id `IMAGE_SLOT`, one for each visual token) and the text that
    all branches begin with. A branch attends to the prefix and to itself, never to another branch, so many questions
    about one image cost its tokens once.
    """

    prefix: list[int]
    branches: list[Branch]
    images: tuple[ImageRef, ...]
    source: str
    # Of each image the views that are not skipped as padding; () where the model skips none.
    seen: tuple[tuple[bool, ...], ...] = ()
    # What happened to it that is worth a count although it is used, such as `cut`: counted as `<source>/<event>`.
    events: Mapping[str, int] = field(default_factory=Counter)
    length: int = field(init=False)  # positions it takes in a row

    def __post_init__(self) -> None:
        self.length = len(self.prefix) + sum(len(branch.ids) for branch in self.branches)

    @property
    def targets(self) -> int:
        """How many tokens are supervised."""
        return sum(sum(branch.supervised) for branch in self.branches)

    @property
    def pairs(self) -> int:
        """How many pairs of positions attention has to compare.

        A position attends to itself and to what is before it in the prefix or in its own branch.
        """
        prefix, branches = len(self.prefix), [len(branch.ids) for branch in self.branches]
        return sum(n * (n + 1) // 2 for n in (prefix, *branches)) + prefix * sum(branches)


IMAGE_SLOT = -1
"""Token id, in a `Sample`, of a position that a visual token will take."""


@dataclass(slots=True)
class Batch:
    """Packed rows. B rows of T positions, N images with L visual tokens together, V views each.

    Every tensor but `pixels` is small. A row holds several samples (segments); padding has segment 0.
    """

    input_ids: Tensor  # [B, T] int64; 0 at image slots and padding
    labels: Tensor  # [B, T] int64: the *next* token where it is supervised, else IGNORE
    weights: Tensor  # [B, T] float32: weight of that target in the loss; 0 where labels is IGNORE
    segment_ids: Tensor  # [B, T] int32: 1, 2, ... within a row; 0 is padding
    branch_ids: Tensor  # [B, T] int32: 0 in a segment's shared prefix, 1, 2, ... in its branches
    position_ids: Tensor  # [B, T] int64: restarts at each segment; a branch goes on from its prefix
    task_ids: Tensor  # [B, T] int32: index into `tasks`, valid where labels is not IGNORE
    pixels: Tensor  # [N, 3, S, S] uint8, padded square images; N may be 0
    image_slots: Tensor  # [L] int64: flat index b * T + t of every visual token, image by image
    seen_views: Tensor | None = None  # [N, V] bool where the model skips views that show only padding
    source_ids: Tensor | None = None  # [B, T] int32: index into `sources`, as `task_ids`; None where none are named
    tasks: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # of the run's whole mixture: the same on all ranks
    keys: list[str] = field(default_factory=list)  # "source/key" of every sample in the batch
    counters: dict[str, float] = field(default_factory=dict)  # additive: samples, tokens, pairs, images, views, ...
    examples: dict[str, str] = field(default_factory=dict)  # a counter of what is skipped -> its first, in words
    # Of the whole accumulation window on this rank, all micro-batches together, counted after decoding:
    window_weight: float = 0.0
    window_end: bool = True  # the last micro-batch of its window
    window: int = 0  # its number since the start of the run, by which the planner knows where it was

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with every tensor on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def keys_at(self, positions: Tensor) -> list[str]:
        """Keys of the samples that these flat positions b * T + t are in."""
        # Keys stand in the order of rows, segments and branches; shared prefixes have branch 0 and no key.
        row = torch.arange(len(self.input_ids), device=self.segment_ids.device)[:, None].expand_as(self.segment_ids)
        place = torch.stack([row.flatten(), self.segment_ids.flatten(), self.branch_ids.flatten()], dim=1)
        branches = torch.unique(place[place[:, 2] > 0], dim=0)
        found = torch.unique(place[positions], dim=0)
        at = (found[:, None] == branches[None]).all(-1).nonzero()[:, 1]
        return [self.keys[i] for i in at.tolist()]

    def pin_memory(self) -> Batch:
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        moved: dict[str, Any] = {
            f.name: function(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)
