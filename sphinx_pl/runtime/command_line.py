"""Turns the text that people type on a command line into overrides that Hydra can read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hydra._internal.utils import get_args_parser

from sphinx_pl.utils.config import escaped
from sphinx_pl.utils.errors import UserError

TYPED = {
    "train": ("output_dir", "ckpt_path", "data.root", "data.tokenizer", "stage.init_from"),
    "chat": ("checkpoint", "image", "question", "sam"),
    "evaluate": ("checkpoint", "out", "report", "mixture_out", "data.root", "benchmark.root"),
    "mix_weights": ("base", "out", "curve_dir", "data.root"),
}
"""For each script, the keys whose values people type.

They are taken literally, without Hydra's grammar.
"""
_SENTENCES = ("question",)
"""The keys of `TYPED` that hold sentences instead of paths.

Even quotes, `${` and the word null stay as they are.
"""


def literal(text: str) -> str:
    """Return a value of Hydra's grammar that means exactly this text."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: 2 * match[1] + (r"\'" if match[2] else ""), escaped(text)) + "'"


_OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][\w./]*(@[\w.:]*)?=")
_OPTION = re.compile(r"(--?[A-Za-z][\w-]*|~[A-Za-z_][\w./]*(@[\w.:]*)?)(=.*)?", re.DOTALL)
"""An option of Hydra or the removal of a key. Both are a single word."""


def as_typed(script: str, arguments: Sequence[str]) -> list[str]:
    """Return a command line in which Hydra takes the values of `TYPED` keys literally.

    A path may still be an interpolation (`out=mixed_${beta}`) or be quoted as Hydra expects. A
    sweep is left to Hydra entirely, because a comma separates values there.
    """
    if {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    return [_as_typed(script, argument) for argument in arguments]


def _as_typed(script: str, argument: str) -> str:
    name, equals, value = argument.partition("=")
    key = name.lstrip("+")
    sentence = key in _SENTENCES
    if not equals or key not in TYPED.get(script, ()) or value == "" or (value == "null" and not sentence):
        return argument
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if not sentence and (quoted or "${" in value):
        return argument
    # For OmegaConf, three question marks alone mean that a value is missing.
    return f"{name}={literal(value if value != '???' else value + ' ')}"


def take_rest(arguments: Sequence[str], key: str, keys: Iterable[str]) -> list[str]:
    """Return a command line whose last words became the value of `key`.

    The value begins at the first word that is neither key=value nor an option, or after `--`.

    Args:
        keys: the script's own keys, to notice a key that follows the words.

    Raises:
        UserError: a key follows the words, or the value is given twice.
    """
    line = list(arguments)
    start = next(
        (n for n, one in enumerate(line) if one == "--" or not (_OPTION.fullmatch(one) or _OVERRIDE.match(one))), None
    )
    if start is None or any(one.startswith("-") for one in line[:start]):
        return line  # An option of Hydra may be followed by a value: `--cfg job`.
    options, words = line[:start], line[start:]
    if words[0] == "--":
        words = words[1:]
    else:
        for word in words:
            if word.partition("=")[0].partition(".")[0] in keys and "=" in word:
                raise UserError(f"{word} follows the {key}: write it before the {key}, or write -- before the {key}")
    if any(one.startswith(f"{key}=") for one in options):
        raise UserError(f"'{' '.join(words)}' is given beside {key}=: give only one of them")
    return [*options, f"{key}={' '.join(words)}"] if words else options


def refuse_options(arguments: Sequence[str]) -> None:
    """Refuse options that Hydra does not have. argparse would print its usage instead.

    Raises:
        UserError: there is such an option, or an option stands between overrides.
    """
    if unknown := get_args_parser().parse_known_args(arguments)[1]:
        if not unknown[0].startswith("-"):  # argparse accepts the overrides only in one row
            raise UserError(f"{unknown[0]} follows an option: write options such as -m before all KEY=VALUE")
        key, _, value = unknown[0].lstrip("-").partition("=")
        following = unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else "VALUE"
        raise UserError(f"{unknown[0]} is not an option: write {key}={value or following}, without dashes")
