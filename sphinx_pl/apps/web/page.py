"""The actions behind the controls of the page, without its layout."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sphinx_pl.apps.masks import Segmenter
from sphinx_pl.apps.web.rendering import find_marks
from sphinx_pl.apps.web.session import Exchange, Session, UploadedImage, data_uri
from sphinx_pl.data.coordinates import to_pixels
from sphinx_pl.data.images import decode
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.generation.assistant import Assistant, Dialog, open_picture, typed
from sphinx_pl.generation.generate import GenerationConfig
from sphinx_pl.utils.errors import UserError

# The seconds between two states of a growing answer. A shorter interval only burdens the browser.
_INTERVAL = 0.03
_log = logging.getLogger(__name__)
_SLOT = re.compile(r"\{(\w+)\}")
_REFUSED = {
    "image_truncated": "the image is damaged, its end is missing.",
    "image_unreadable": "this is not an image that can be read: give a JPEG, PNG or WebP file.",
    "image_aspect": "the image is too thin.",
}


@dataclass
class WebConfig:
    """Where the page is served, and what it accepts.

    `max_upload_mb` is in units of 10^6 bytes. `max_pixels` limits width times height.

    Raises:
        UserError: a port or limit is impossible.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    max_upload_mb: float = 20.0
    max_pixels: int = 64_000_000

    def __post_init__(self) -> None:
        if not self.host.strip():
            raise UserError(
                "host is empty: 127.0.0.1 serves this machine alone, 0.0.0.0 serves everyone who can reach it"
            )
        if not 1 <= self.port <= 65535:
            raise UserError(f"port={self.port} must be 1 to 65535")
        if not 0 < self.max_upload_mb < math.inf:
            raise UserError(f"max_upload_mb={self.max_upload_mb} must be positive")
        if self.max_pixels < 1:
            raise UserError(f"max_pixels={self.max_pixels} must be positive")


def instructions() -> dict[str, str]:
    """Return the evaluation wording of every task that applies to any image, by the task's name.

    It contains slots such as `{phrase}`, as in the registry.
    """
    return {
        name: task.templates[0]
        for name, task in TASKS.items()
        if task.needs_image and "{question}" not in task.templates[0]
    }


class Page:
    """The actions of the page's controls.

    A session belongs to one tab; all tabs share the model, one answer at a time.
    """

    def __init__(
        self, assistant: Assistant, generation: GenerationConfig, config: WebConfig, segmenter: Segmenter | None = None
    ) -> None:
        self.assistant = assistant
        self.generation = generation
        self.config = config
        self.segmenter = segmenter
        self.coordinates = assistant.processor.coordinates

    @property
    def sees(self) -> bool:
        """Whether the model has visual encoders."""
        return self.assistant.model.mixer is not None

    def show(self, session: Session, data: bytes, name: str) -> str:
        """Talk about this uploaded image from now on. Return the problem with it, or "".

        Args:
            data: the bytes of the file.
            name: its name on the page.
        """
        if not self.sees:
            return "This model reads only text."
        if len(data) > self.config.max_upload_mb * 1e6:
            return f"{name} is larger than {self.config.max_upload_mb:g} MB."
        try:
            image = decode(data, name, self.config.max_pixels)
        except SkipSample as error:
            if error.reason == "image_too_large":
                return f"{name} has too many pixels: at most {self.config.max_pixels:,} are accepted."
            return f"{name}: {_REFUSED.get(error.reason, str(error))}"
        self._take(session, image, name)
        return ""

    def _take(self, session: Session, image: Image.Image, name: str) -> None:
        session.picture = UploadedImage.make(image, name, self.assistant.processor.image_size)
        session.restart()

    def start(self, image: str | None) -> Session:
        """Return a new session, about an image file if one is given.

        Raises:
            UserError: the image cannot be used.
        """
        session = Session()
        if image is not None:
            if not self.sees:
                raise UserError(f"image={image}: this model has no vision part (model.vision=null)")
            self._take(session, open_picture(image), Path(image).name)
        return session

    def begin(self, session: Session, question: str) -> str:
        """Accept a question. Return the reason if it is refused, or ""."""
        question = question.strip()
        if session.busy:
            return "An answer is still being written: stop it first."
        if not question:
            return "Write a question first."
        slots = [
            slot for slot in _SLOT.findall(question) if any(f"{{{slot}}}" in text for text in instructions().values())
        ]
        if slots:
            return f"Replace {{{slots[0]}}} with your own words."
        session.exchanges.append(Exchange(question, growing=True, ticket=session.ticket))
        return ""

    def answer(self, session: Session, max_new_tokens: float, temperature: float, top_p: float) -> Iterator[str]:
        """Let the last question's answer grow in the session.

        Yield the problem after each step, or "".
        """
        if not session.busy:
            return
        exchange, number = session.exchanges[-1], len(session.exchanges) - 1
        images = [session.picture.square] if session.picture is not None else []
        problem = ""
        try:
            config = replace(
                self.generation,
                max_new_tokens=int(max_new_tokens),
                temperature=float(temperature),
                top_p=float(top_p),
            )
            steps = self.assistant.stream([Dialog(typed(exchange.question), images, session.history)], config)
            last = 0.0
            # The answer may have been stopped while it was waiting.
            while session.ticket == exchange.ticket and (texts := next(steps, None)) is not None:
                (exchange.answer,) = texts
                if time.monotonic() - last >= _INTERVAL:
                    yield ""
                    last = time.monotonic()
        except UserError as error:
            problem = str(error)
        except Exception as error:  # such as out of memory: other conversations continue
            _log.exception("The answer failed")
            problem = f"The answer failed ({type(error).__name__}): see the terminal for details."
        finally:  # also if the tab was closed
            exchange.growing = False
        if problem:
            session.exchanges = [other for other in session.exchanges if other is not exchange]
        yield problem
        if self.segmenter is None or session.picture is None or problem or session.ticket != exchange.ticket:
            return
        try:
            exchange.masks = self._masks(self.segmenter, session.picture, exchange, number)
            yield ""
        except Exception as error:
            _log.exception("The masks failed")
            yield f"The masks failed ({type(error).__name__}): see the terminal for details."

    def _masks(self, segmenter: Segmenter, picture: UploadedImage, exchange: Exchange, number: int) -> dict[str, str]:
        marks = find_marks(self.coordinates.pieces(exchange.answer), f"a{number}-")
        boxes = [(mark, to_pixels(box, picture.preview.size)) for mark in marks for box in mark.piece.boxes]
        if not boxes:
            return {}
        overlays: dict[str, Image.Image] = {}
        for (mark, _), mask in zip(boxes, segmenter.segment(picture.preview, [box for _, box in boxes]), strict=True):
            overlay = overlays.setdefault(mark.key, Image.new("RGBA", picture.preview.size))
            overlay.paste(f"{mark.colour}80", (0, 0), Image.fromarray(mask))
        return {key: data_uri(overlay, "PNG") for key, overlay in overlays.items()}

    def stop(self, session: Session) -> None:
        """Stop the growing answer. Its text so far stays."""
        session.ticket += 1

    def fill(self, session: Session, template: str) -> str:
        """An instruction for the question box, whose `{box}` is the box of the whole image."""
        if session.picture is None:
            return template
        width, height = session.picture.size
        return template.replace("{box}", self.coordinates.box((0, 0, width, height), session.picture.size))

    def point_out(self, session: Session, question: str, box_px: Any) -> str:
        """Return the question with the box that was dragged on the picture.

        It replaces the question's last box, if any.

        Args:
            box_px: the browser's value. Four pixel coordinates are expected; any other value
                changes nothing.
        """
        if session.picture is None or not isinstance(box_px, list) or len(box_px) != 4:
            return question
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in box_px):
            return question
        width, height = session.picture.size
        x1, x2 = sorted(min(max(value, 0), width) for value in box_px[0::2])
        y1, y2 = sorted(min(max(value, 0), height) for value in box_px[1::2])
        box = self.coordinates.box((x1, y1, x2, y2), session.picture.size)
        if "{box}" in question:
            return question.replace("{box}", box)
        boxes = [piece for piece in self.coordinates.pieces(question) if piece.boxes]
        if boxes:
            before, _, after = question.rpartition(boxes[-1].numbers)
            return before + box + after
        return f"{question.rstrip()} {box}".lstrip()
