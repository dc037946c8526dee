"""A folder of data that a command generates: it is made whole or not at all, and only once.

`manifest.json` is written last. It holds what identifies the data, the counts, and the SHA-256 of
every file.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import hash_file

MANIFEST = "manifest.json"
SHARD_SIZE = 1000


@dataclass
class GeneratedFolder:
    """The folder that is being filled, with the seed and the counts of what is in it."""

    root: Path
    seed: int
    scale: float
    counts: Counter[str] = field(default_factory=Counter)

    def rng(self, *stream: object) -> random.Random:
        """Return a generator for one item.

        Each item has its own, so that no item depends on the number of items before it.
        """
        return random.Random("/".join(map(str, (self.seed, *stream))))

    def number(self, at_full_scale: int) -> int:
        """Return the number of items at this scale, at least 4."""
        return max(4, round(at_full_scale * self.scale))

    def write(self, name: str, content: bytes | str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def generate(
    out: str | Path, identity: Mapping[str, Any], fill: Callable[[Path], Mapping[str, int]], what: str
) -> dict[str, Any]:
    """Make the data in the folder `out` and return its manifest.

    Nothing is made if the same data is already there and whole.

    Args:
        identity: what the data depend on. Data with other values of the same keys are replaced.
        fill: writes the files into a folder and returns the counts.
        what: the name of the data in messages.

    Raises:
        UserError: `out` exists and holds something else.
    """
    out = Path(out)
    if (intact := _intact(out, identity)) is not None:
        return intact
    if out.exists() and not _replaceable(out, identity):
        raise UserError(f"out={out} is not empty and not {what}: choose another folder or empty this one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        root = Path(temporary) / "new"
        root.mkdir()
        counts = fill(root)
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        manifest = {
            **identity,
            "counts": dict(sorted(counts.items())),
            "files": {name: hash_file(root / name) for name in names},
        }
        (root / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        if out.exists():
            out.replace(Path(temporary) / "old")
        root.replace(out)
    return manifest


def _replaceable(out: Path, identity: Mapping[str, Any]) -> bool:
    """Return whether `out` may be replaced: an empty folder, or data of this kind.

    Other folders have a manifest.json too, so its keys are checked.
    """
    if not out.is_dir():
        return False
    try:
        keys = json.loads((out / MANIFEST).read_text()).keys() if any(out.iterdir()) else None
    except (OSError, ValueError, AttributeError):
        return False
    return keys is None or keys == {*identity, "counts", "files"}


def _intact(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text())
        same = all(manifest.get(key) == value for key, value in identity.items())
        whole = same and all(hash_file(out / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return manifest if whole else None


def pair_files(
    key: str, jpeg: bytes, size: tuple[int, int], caption: str, url: str, columns: Mapping[str, Any]
) -> list[tuple[str, bytes]]:
    """Return the three files of an image-text pair as img2dataset writes them.

    Args:
        size: (width, height) of the picture.
        columns: further columns of the json.
    """
    digest = hashlib.sha256(jpeg).hexdigest()
    width, height = size
    metadata = {
        **columns,
        "caption": caption,
        "error_message": None,
        "height": height,
        "key": key,
        "original_height": height,
        "original_width": width,
        "sha256": digest,
        "status": "success",
        "uid": digest[:32],
        "url": url,
        "width": width,
    }
    return [
        (f"{key}.jpg", jpeg),
        (f"{key}.json", json.dumps(metadata, sort_keys=True).encode()),
        (f"{key}.txt", caption.encode()),
    ]


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Return a tar archive of (name, content). Equal members give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)  # without a time the bytes are always the same
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def json_file(entries: object) -> str:
    """Return entries as the compact text of a JSON file. Equal entries give equal text."""
    return json.dumps(entries, sort_keys=True, separators=(",", ":"))
