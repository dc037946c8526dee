"""The types that the parts of the project exchange.

reader -> `Record` -> task -> `Sample` -> mixture and packer -> `Batch` -> model

A `Record` holds what a data set says, in pixels of the original image. A `Sample` holds what the
model reads, in token ids. A `Batch` holds the rows of a micro-batch. The model knows nothing of
records, and the data nothing of modules.
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
"""The label of a position without supervision."""
PLACEHOLDER = "<image>"
"""The mark of an image's place in a question."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """The place of an encoded image: a whole file, or `size` bytes at `offset` of a tar shard.

    Decoding turns the image upright. Then `crop` cuts out (x1, y1, x2, y2) in pixels, `flip`
    mirrors left and right, and the result is padded. `annotated` is the (width, height) of the
    image that coordinates (and `crop`) refer to. Decoding compares it with the pixels
    (`sphinx_pl.data.images.load_image`); None compares nothing.
    """

    path: str
    offset: int = 0
    size: int = -1
    crop: tuple[int, int, int, int] | None = None
    flip: bool = False
    annotated: tuple[int, int] | None = field(default=None, compare=False)  # it names the same image with and without

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageRef:
        """The reference that `dataclasses.asdict` gave. JSON, which makes lists of tuples, may lie
        between."""
        lists = {name: tuple(values[name]) for name in ("crop", "annotated") if values.get(name)}
        return cls(**{**values, **lists})


@dataclass(frozen=True, slots=True)
class Region:
    """A labelled box in pixels of the original image: (x1, y1) is top left, (x2, y2) is bottom
    right.

    `keypoints` are (x, y, visibility) in pixels, in COCO's order for a person. Visibility 0 means
    absent, 1 hidden, 2 visible.
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
    """One annotated item of a source, before any wording of its instruction is chosen.

    The task decides which fields a record needs (`sphinx_pl.data.tasks`). A task with free text has
    `turns`. A task with coordinates has `regions` in pixels and writes the text itself.
    """

    key: str  # unique within its source, stable over runs
    task: str  # name in the task registry
    images: tuple[ImageRef, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of each image; () if the source has none
    turns: tuple[Turn, ...] = ()
    system: str | None = None  # the text before the first turn; None: the processor's
    question: str = ""
    answer: str = ""
    choices: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=Counter)  # see `Sample`


@dataclass(slots=True)
class SampleQuestion:
    """One question, or conversation, behind a sample's shared prefix (BOS, images, system text)."""

    ids: list[int]
    supervised: list[bool]  # True where this id is a target
    task: str
    key: str


@dataclass(slots=True)
class Sample:
    """A tokenized item whose length is known before its images are decoded.

    All questions share `prefix`: BOS, image slots (id `IMAGE_SLOT`, one for each visual token) and
    the text that all questions begin with. A question attends to the prefix and to itself, never to
    another question. So many questions about one image cost its tokens once.
    """

    prefix: list[int]
    questions: list[SampleQuestion]
    images: tuple[ImageRef, ...]
    source: str
    # The views of each image that are not skipped as padding; () if the model skips none.
    kept_views: tuple[tuple[bool, ...], ...] = ()
    # Events that are counted although the sample is used, such as `cut`. The counter is
    # `<source>/<event>`.
    events: Mapping[str, int] = field(default_factory=Counter)
    length: int = field(init=False)  # positions that the sample takes in a row

    def __post_init__(self) -> None:
        self.length = len(self.prefix) + sum(len(question.ids) for question in self.questions)

    @property
    def targets(self) -> int:
        """The number of supervised tokens."""
        return sum(sum(question.supervised) for question in self.questions)

    @property
    def pairs(self) -> int:
        """The number of pairs of positions that attention has to compare.

        A position attends to itself and to earlier positions of the prefix and of its own question.
        """
        prefix, questions = len(self.prefix), [len(question.ids) for question in self.questions]
        return sum(n * (n + 1) // 2 for n in (prefix, *questions)) + prefix * sum(questions)


IMAGE_SLOT = -1
"""The token id, in a `Sample`, of a position that a visual token will take."""


@dataclass(slots=True)
class Batch:
    """Packed rows: B rows of T positions, and N images of V views with L visual tokens together.

    Every tensor but `pixels` is small. A row holds several samples (segments). Padding has segment
    0.
    """

    input_ids: Tensor  # [B, T] int64; 0 at image slots and padding
    labels: Tensor  # [B, T] int64: the *next* token where it is supervised, else IGNORE
    weights: Tensor  # [B, T] float32: weight of that target in the loss; 0 where labels is IGNORE
    segment_ids: Tensor  # [B, T] int32: 1, 2, ... within a row; 0 is padding
    question_ids: Tensor  # [B, T] int32: 0 in a segment's shared prefix, 1, 2, ... in its questions
    position_ids: Tensor  # [B, T] int64: restarts at each segment; a question continues from its prefix
    task_ids: Tensor  # [B, T] int32: index into `tasks`, valid where labels is not IGNORE
    pixels: Tensor  # [N, 3, S, S] uint8, padded square images; N may be 0
    image_slots: Tensor  # [L] int64: flat index b * T + t of every visual token, image by image
    kept_views: Tensor | None = None  # [N, V] bool where the model skips views that show only padding
    source_ids: Tensor | None = None  # [B, T] int32: index into `sources`, as `task_ids`; None without `sources`
    tasks: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # those of the run's whole mixture: the same on all ranks
    keys: list[str] = field(default_factory=list)  # "source/key" of every sample in the batch
    counters: dict[str, float] = field(default_factory=dict)  # additive: samples, tokens, pairs, images, views, ...
    examples: dict[str, str] = field(default_factory=dict)  # a counter of what is skipped -> its first example
    step_weight: float = 0.0  # sum of `weights` over this rank's micro-batches of the step, counted after decoding
    ends_step: bool = True  # whether this is the last micro-batch of its step
    step: int = 0  # number of the planned step since the start of the run; the planner knows its position by it

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with every tensor on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def keys_at(self, positions: Tensor) -> list[str]:
        """The keys of the samples that hold these flat positions b * T + t."""
        # Keys are in the order of rows, segments and questions. Shared prefixes have question 0 and
        # no key.
        row = torch.arange(len(self.input_ids), device=self.segment_ids.device)[:, None].expand_as(self.segment_ids)
        place = torch.stack([row.flatten(), self.segment_ids.flatten(), self.question_ids.flatten()], dim=1)
        questions = torch.unique(place[place[:, 2] > 0], dim=0)
        wanted = torch.unique(place[positions], dim=0)
        at = (wanted[:, None] == questions[None]).all(-1).nonzero()[:, 1]
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
