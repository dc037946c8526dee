"""Talk to a model in the terminal. Keys: conf/chat.yaml."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from sphinx_pl.cli import entry_point
from sphinx_pl.errors import UserError
from sphinx_pl.typed import pick


@dataclass
class Generation:
    """As conf/chat.yaml's `generation`."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class ChatConfig:
    """The keys of conf/chat.yaml, which explains them, with their types."""

    checkpoint: Optional[str] = None
    image: Optional[str] = None
    question: Optional[str] = None
    generation: Generation = field(default_factory=Generation)
    device: str = "auto"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise UserError("which checkpoint? Give checkpoint=FOLDER, such as one that train.py wrote")


@entry_point(config_name="chat")
def main(cfg: DictConfig) -> None:
    """Reads questions from the terminal until /quit."""
    options = pick(ChatConfig, cfg)
    assert options.checkpoint is not None

    from sphinx_pl.inference import Assistant
    from sphinx_pl.models.generation import GenerationConfig
    from sphinx_pl.terminal import Terminal

    generation = GenerationConfig(**vars(options.generation))
    assistant = Assistant.load(options.checkpoint, options.device, options.precision)
    folder = Path(HydraConfig.get().runtime.output_dir)
    terminal = Terminal(assistant, generation, folder, Console(highlight=False))
    if options.image:
        terminal.show(options.image)
    if options.question is not None:
        terminal.ask(options.question)
    else:
        terminal.talk(sys.stdin)


if __name__ == "__main__":
    main()
