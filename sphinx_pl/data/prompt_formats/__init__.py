"""Prompt formats: turns to one string, with the ranges of characters that are answers."""

from sphinx_pl.data.prompt_formats.base import PromptFormat, Rendered, is_document
from sphinx_pl.data.prompt_formats.chat_template import ChatTemplate
from sphinx_pl.data.prompt_formats.turns import FORMATS, SPHINX, SYSTEM, TurnFormat
from sphinx_pl.data.tokenizers import Tokenizer
from sphinx_pl.utils.errors import UserError, suggest

MODEL = "model"
"""The name of the format that is the model's own chat template."""

__all__ = [
    "FORMATS",
    "MODEL",
    "SPHINX",
    "SYSTEM",
    "ChatTemplate",
    "PromptFormat",
    "Rendered",
    "TurnFormat",
    "default_system",
    "format_names",
    "is_document",
    "prompt_format",
]


def format_names() -> list[str]:
    return [*FORMATS, MODEL]


def default_system(name: str) -> str:
    """The system text of a format of `format_names`. That of a chat template is the template's own."""
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
        raise UserError(f"data.processor.prompt_format='{name}': {suggest(name, format_names())}")
    return FORMATS[name].bound(tokenizer)
