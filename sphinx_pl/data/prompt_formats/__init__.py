"""Prompt formats: turns to one string, with the ranges of characters that are answers."""

from sphinx_pl.data.prompt_formats.base import PromptFormat, Rendered, is_document
from sphinx_pl.data.prompt_formats.chat_template import ChatTemplate
from sphinx_pl.data.prompt_formats.turns import FORMATS, SPHINX, SYSTEM, TurnFormat
from sphinx_pl.data.tokenizers import Tokenizer
from sphinx_pl.utils.errors import UserError, suggest

MODEL = "model"
"""The name of the format that is the model's own chat template."""
NAMES = (*FORMATS, MODEL)

__all__ = [
    "FORMATS",
    "MODEL",
    "NAMES",
    "SPHINX",
    "SYSTEM",
    "ChatTemplate",
    "PromptFormat",
    "Rendered",
    "TurnFormat",
    "default_system",
    "is_document",
    "prompt_format",
]


def default_system(name: str) -> str:
    """The system text of a format of `NAMES`. That of a chat template is the template's own."""
    return "" if name == MODEL else FORMATS[name].system


def prompt_format(name: str, tokenizer: Tokenizer) -> PromptFormat:
    """The format of that name as this tokenizer writes it.

    Raises:
        UserError: there is none of that name, or the tokenizer has no chat template that can be
            used.
    """
    if name == MODEL:
        return ChatTemplate(tokenizer)
    if name not in FORMATS:
        raise UserError(f"data.processor.prompt_format='{name}': {suggest(name, NAMES)}")
    return FORMATS[name].bound(tokenizer)
