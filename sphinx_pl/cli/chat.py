"""Talk to a model in the terminal or on a local web page.

The file conf/chat.yaml explains the keys.
"""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from sphinx_pl.generation.decoding import Decoding
from sphinx_pl.runtime.command_line import take_rest
from sphinx_pl.runtime.hydra_app import entry_point
from sphinx_pl.utils.config import pick
from sphinx_pl.utils.errors import UserError, suggest

if TYPE_CHECKING:
    from sphinx_pl.generation.generate import GenerationConfig


@dataclass
class Generation(Decoding):
    """The keys of `generation` in conf/chat.yaml."""

    max_new_tokens: int = 512


UIS = ("terminal", "web")


@dataclass
class ChatConfig:
    """The keys of conf/chat.yaml with their types. That file explains them."""

    checkpoint: Optional[str] = None
    ui: str = "terminal"
    image: Optional[str] = None
    question: Optional[str] = None
    generation: Generation = field(default_factory=Generation)
    device: str = "auto"
    precision: str = "fp32"
    host: str = "127.0.0.1"
    port: int = 7860
    max_upload_mb: float = 20.0
    max_pixels: int = 64_000_000
    sam: Optional[str] = None

    def __post_init__(self) -> None:
        if self.ui not in UIS:
            raise UserError(f"ui={self.ui}: {suggest(self.ui, UIS)}")
        if self.checkpoint is None:
            # A folder without `checkpoint=` in front of it is read as the question.
            folder = self.question if os.path.isdir(self.question or "") else None  # noqa: PTH112, which raises for long texts
            such = f"checkpoint={folder}" if folder else "checkpoint=FOLDER, such as one that train.py wrote"
            raise UserError(f"which checkpoint? Give {such}")
        if self.ui == "terminal" and self.question is not None and not self.question.strip():
            raise UserError("question= is empty: write a question, or omit it and type the questions")


def check(cfg: DictConfig) -> None:
    """Check the configuration of chat.py.

    Raises:
        UserError: nothing reads a key, or a value is wrong.
    """
    pick(ChatConfig, cfg)


@entry_point("chat", check, partial(take_rest, key="question", keys=ChatConfig.__dataclass_fields__))
def main(cfg: DictConfig) -> None:
    """Read questions from the terminal until /quit, or serve the page until it is interrupted."""
    options = pick(ChatConfig, cfg)
    assert options.checkpoint is not None

    from sphinx_pl.apps.terminal import Terminal
    from sphinx_pl.generation.assistant import Assistant, open_picture
    from sphinx_pl.generation.generate import GenerationConfig

    generation = GenerationConfig(**vars(options.generation))
    if options.image:
        open_picture(options.image)  # a mistake is reported before the model is loaded
    if options.ui == "web":
        _serve(options, generation)
        return
    assistant = Assistant.load(options.checkpoint, options.device, options.precision)
    folder = Path(HydraConfig.get().runtime.output_dir)
    terminal = Terminal(assistant, generation, folder, Console(highlight=False))
    if options.image:
        terminal.show(options.image)
    if options.question is not None:
        terminal.ask(options.question)
    else:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        terminal.talk(sys.stdin)


def _serve(options: ChatConfig, generation: GenerationConfig) -> None:
    from sphinx_pl.apps.masks import Segmenter
    from sphinx_pl.apps.web.app import check_address, serve
    from sphinx_pl.apps.web.page import Page, WebConfig
    from sphinx_pl.generation.assistant import Assistant
    from sphinx_pl.runtime.device import choose_device

    assert options.checkpoint is not None
    config = WebConfig(options.host, options.port, options.max_upload_mb, options.max_pixels)
    check_address(config.host, config.port)
    segmenter = Segmenter.load(options.sam, choose_device(options.device)) if options.sam else None
    assistant = Assistant.load(options.checkpoint, options.device, options.precision)
    page = Page(assistant, generation, config, segmenter)
    serve(page, page.start(options.image), options.checkpoint, options.question or "")


if __name__ == "__main__":
    main()
