"""Where a checkpoint comes from: the code, the versions, the command and the parents, written
beside the weights.

The environment's variables are left out, since they hold credentials; so are values that a key's
name marks as secret.
"""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import sphinx_pl

_SECRET = re.compile(r"(^|_)(api_?key|password|passwd|secret|credentials?|(access|auth|api|hf)_token)$", re.IGNORECASE)


def provenance(
    stage: str, config: Mapping[str, Any] | None = None, parents: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """A JSON-ready description of how the weights being written came to be.

    Args:
        stage: what made them, e.g. "pretrain_real" or "mix".
        config: the composed configuration, if there is one.
        parents: of each checkpoint that went in, `Checkpoint.identity()`.
    """
    return {
        "stage": stage,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [_without_secret(argument) for argument in sys.argv],
        "code": {"version": sphinx_pl.__version__, **_git()},
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "lightning")},
        },
        "config": None if config is None else _redact(config),
        "parents": [dict(parent) for parent in parents],
    }


def _git() -> dict[str, Any]:
    """Commit and whether tracked files differ; {} if this package is not in a repository."""
    folder = Path(sphinx_pl.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # An installed copy may lie inside some other project's checkout (a .venv); that commit says
        # nothing about it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _redact(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {str(name): _redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, key) for item in value]
    return "***" if value is not None and _SECRET.search(key) else value


def _without_secret(argument: str) -> str:
    name, equals, _ = argument.partition("=")
    return f"{name}=***" if equals and _SECRET.search(name.rpartition(".")[2].lstrip("+~-")) else argument
