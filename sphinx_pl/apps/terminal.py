"""A conversation in the terminal, with streamed answers and pictures of the places they name."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image
from rich.console import Console

from sphinx_pl.data.coordinates import padded_frame
from sphinx_pl.data.drawing import draw
from sphinx_pl.data.images import padded_resize
from sphinx_pl.generation.assistant import Assistant, Dialog, open_picture, typed
from sphinx_pl.generation.generate import GenerationConfig
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HELP = "/image PATH: talk about another image   /new: start a new conversation   /quit"


class Terminal:
    """One user's dialog with an assistant.

    `folder` gets a PNG for each answer that names places.
    """

    def __init__(self, assistant: Assistant, generation: GenerationConfig, folder: Path, console: Console) -> None:
        self.assistant = assistant
        self.generation = generation
        self.folder = folder
        self.console = console
        self.image: Image.Image | None = None
        self.dialog = Dialog("")
        self._drawn = 0

    def show(self, path: str) -> None:
        """Talk about this image from now on.

        Raises:
            UserError: the image cannot be read.
        """
        self.image = open_picture(path)
        self.dialog = Dialog("", images=[self.image])

    def talk(self, lines: Iterable[str]) -> None:
        """Answer line after line until /quit or the end.

        Errors are printed, and the dialog continues.
        """
        self.console.print(HELP)
        self.console.print("> ", end="")
        for line in lines:
            command, _, argument = line.strip().partition(" ")
            try:
                if command == "/quit":
                    return
                elif command == "/new":
                    self.dialog = Dialog("", images=self.dialog.images)
                elif command == "/image":
                    self.show(argument.strip())
                elif command.startswith("/"):
                    self.console.print(f"There is no command {command}. {HELP}", markup=False)
                elif line.strip():
                    self.ask(line.strip())
            except UserError as error:
                self.console.print(f"error: {error}", markup=False)
            self.console.print("> ", end="")

    def ask(self, question: str) -> str:
        """Print the answer as it grows, draw the places that it names, and return it."""
        dialog = Dialog(typed(question), self.dialog.images, self.dialog.history)
        answer = ""
        for (text,) in self.assistant.stream([dialog], self.generation):
            more = text[len(answer) :] if text.startswith(answer) else f"\n{text}"
            # The model's text must not control the terminal, nor become emoji.
            self.console.print(_CONTROL.sub("", more), end="", markup=False, emoji=False, soft_wrap=True)
            answer = text
        self.console.print()
        if answer:  # A turn without an answer is not kept.
            self.dialog = dialog.answered(typed(answer), "")
        if self.image is not None:
            self._draw(self.image, question, answer)
        return answer

    def _draw(self, image: Image.Image, question: str, answer: str) -> None:
        coordinates = self.assistant.processor.coordinates
        if not coordinates.parse_boxes(answer) and not coordinates.parse_points(answer):
            return
        side, dx, dy = padded_frame(image.size)
        picture = draw(padded_resize(image, side), "", answer, coordinates, question)
        picture = picture.crop((dx, dy, dx + image.width, dy + image.height))
        encoded = io.BytesIO()
        picture.save(encoded, format="PNG")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drawn += 1
        file = self.folder / f"{self._drawn:03d}.png"
        write_whole(file, encoded.getvalue())
        self.console.print(f"{file}", markup=False, emoji=False, soft_wrap=True)
        if self.console.is_terminal and (sequence := inline_image(encoded.getvalue(), os.environ)):
            self.console.file.write(sequence + "\n")


def inline_image(png: bytes, environment: Mapping[str, str]) -> str | None:
    """Return the sequence that shows a picture in iTerm2 or kitty, or None in other terminals."""
    data = base64.b64encode(png).decode()
    if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return f"\033]1337;File=inline=1;size={len(png)}:{data}\a"
    if "KITTY_WINDOW_ID" in environment:
        chunks = [data[start : start + 4096] for start in range(0, len(data), 4096)]
        parts = []
        for number, chunk in enumerate(chunks):
            first = "a=T,f=100," if number == 0 else ""
            parts.append(f"\033_G{first}m={int(number < len(chunks) - 1)};{chunk}\033\\")
        return "".join(parts)
    return None
