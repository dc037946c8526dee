"""The state of one browser tab: the uploaded image and the conversation about it."""

from __future__ import annotations

import base64
import functools
import io
from dataclasses import dataclass, field

from PIL import Image

from sphinx_pl.data.coordinates import Size
from sphinx_pl.data.images import padded_resize
from sphinx_pl.data.schema import Turn
from sphinx_pl.generation.assistant import typed

PREVIEW_SIDE = 1280
"""The longest side in pixels of the picture on the page. The model sees the whole image."""


@dataclass(frozen=True)
class UploadedImage:
    """An uploaded image as the model sees it (`square`), as the page shows it, and its own size
    (width, height)."""

    square: Image.Image
    preview: Image.Image
    size: Size
    name: str

    @classmethod
    def make(cls, image: Image.Image, name: str, side: int) -> UploadedImage:
        """Return the uploaded image of an RGB image. `side` is the model's image size in pixels."""
        preview = image.copy()
        preview.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        return cls(padded_resize(image, side), preview, image.size, name)

    @functools.cached_property
    def source(self) -> str:
        """The preview as a data URI, so that no file has to be served."""
        return data_uri(self.preview, "PNG" if max(self.preview.size) <= 256 else "JPEG")


@dataclass
class Exchange:
    """A question, its answer so far, and the masks of its marks as data URIs by mark.

    `ticket` is the session's ticket when the question was accepted. A newer ticket ends the answer.
    """

    question: str
    answer: str = ""
    growing: bool = False
    ticket: int = 0
    masks: dict[str, str] = field(default_factory=dict)


@dataclass
class Session:
    """A tab's picture and conversation.

    `ticket` counts the events that end an answer: Stop, New, another image.
    """

    picture: UploadedImage | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    ticket: int = 0

    @property
    def busy(self) -> bool:
        """Whether an answer is waiting or growing."""
        return bool(self.exchanges) and self.exchanges[-1].growing

    @property
    def history(self) -> list[Turn]:
        """The earlier turns that the model sees. A turn without an answer is not one of them."""
        return [
            Turn(typed(exchange.question), typed(exchange.answer))
            for exchange in self.exchanges
            if not exchange.growing and exchange.answer.strip()
        ]

    def restart(self) -> None:
        """Start an empty conversation about the same picture."""
        self.exchanges = []
        self.ticket += 1


def data_uri(image: Image.Image, kind: str) -> str:
    encoded = io.BytesIO()
    image.save(encoded, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"
