"""Models on the Hugging Face hub, read from its cache or downloaded to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sphinx_pl.checkpoints.folder import TOKENIZER
from sphinx_pl.models.published import HUB
from sphinx_pl.utils.errors import UserError

_ON_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")
# What the formats read in a folder; not in folders inside it, which hold other formats' copies in
# some repositories.
_HUB_FILES = ("*.json", "*.jinja", TOKENIZER, "model*.safetensors", "consolidated.*.pth")


def local_folder(path: str | Path) -> Path:
    """Where the checkpoint lies that `open_checkpoint` opens: the path itself, or the copy of what
    the hub has.

    Raises:
        UserError: there is none.
    """
    path = _from_hub(path) if isinstance(path, str) and path.startswith(HUB) else Path(path)
    if not path.exists():
        hub = f", or write {HUB}{path} for a model of the hub" if _ON_HUB.fullmatch(str(path)) else ""
        raise UserError(f"checkpoint '{path}' does not exist: check the path{hub}")
    return path


def hub_snapshot(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The files of a repository: as the Hugging Face cache has them if it has weights, else
    downloaded.

    Args:
        revision: a branch, a tag or a commit; None: the main branch.

    Raises what the library does.
    """
    from huggingface_hub import HfApi, snapshot_download

    wanted = list(patterns)
    try:
        cached = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=wanted))
        # Another folder of the repository may be all that is cached.
        if any(any(cached.glob(pattern)) for pattern in wanted if pattern.endswith((".safetensors", ".pth"))):
            return cached
    except FileNotFoundError:
        pass
    HfApi().model_info(
        repository, revision=revision, timeout=10
    )  # without a network the download would try for minutes
    return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))


def _from_hub(source: str) -> Path:
    from huggingface_hub import constants

    parts = source.removeprefix(HUB).split("/")
    if len(parts) < 2 or not all(parts):
        raise UserError(
            f"'{source}' is no name of a model: it has the form {HUB}OWNER/NAME[@REVISION] or "
            f"{HUB}OWNER/NAME[@REVISION]/FOLDER"
        )
    owner, name, *folder = parts
    name, _, revision = name.partition("@")
    repository, inside = f"{owner}/{name}", "/".join(folder)
    patterns = ["/".join([*folder, pattern]) for pattern in _HUB_FILES]
    try:
        return hub_snapshot(repository, patterns, revision or None) / inside
    except Exception as error:  # of many libraries: no network, no such model, no access, a name that is none
        include = " ".join(f"'{pattern}'" for pattern in patterns)
        options = f"--revision {revision} --include {include}" if revision else f"--include {include}"
        raise UserError(
            f"'{source}' is neither in '{constants.HF_HUB_CACHE}' nor downloadable ({type(error).__name__}): run `hf "
            f"download {repository} {options}` on a machine with a network and copy models--{owner}--{name} "
            "into that folder, or give the path of a folder with these files"
        ) from error
