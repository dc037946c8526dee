"""The folder of a training run, and the files of an earlier run that a new run replaces.

A run first moves aside the files that it replaces. They are deleted when the run has saved a
checkpoint or a model. They are restored if the run ends before that.

    .replaced/              files that the run replaces or rewrites, and state.json with its first step
    checkpoints/.replaced/  checkpoints that the run replaces; predictions/.replaced/ likewise
    model-before/           the earlier model, from the first new checkpoint until the new model
    run.lock                the process that writes to the folder

Each transition is one rename or one written file. A kill at any moment leaves a state that
`RunFolder.settle` completes or reverts.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sphinx_pl.runtime.run_lock import RunLock
from sphinx_pl.utils.files import discard, replaced, write_whole

ASIDE = ".replaced"
BEFORE = "model-before"
AGAIN = ".redo"
"""A file that makes the next run replace an earlier run, as overwrite=true does."""
_STATE = "state.json"
_REWRITTEN = (
    "config.yaml",
    "environment.json",
    "metrics.csv",
    "hparams.yaml",
    ".hydra",
    "tensorboard",
    "slurm_job",
    "wandb_id",
)
_BY_STEP = {
    "": re.compile(r"model-step-(\d+)"),
    "checkpoints": re.compile(r"step-(\d+)"),
    "predictions": re.compile(r"step-(\d+)\.\w+"),
}
"""Folder -> pattern of the names of files that are written in it at a step."""


class RunFolder:
    """The folder of a run, from its start to its end. Only the first process of the run uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = RunLock(path)
        self.came_back = False
        """Whether SLURM restarted this job after it had begun to write to the folder."""
        self._mutex = threading.Lock()

    def replaced_by(self, after: int) -> list[Path]:
        """Return the files that a run replaces if it resumes after `after` optimizer steps (-1: a
        new run).

        The newest file comes first.
        """
        candidates: list[tuple[int, Path]] = []
        for folder, names in _BY_STEP.items():
            with suppress(OSError):
                for path in (self.path / folder).iterdir():
                    if (match := names.fullmatch(path.name)) and int(match[1]) > after:
                        candidates.append((int(match[1]), path))
        model = self.path / "model"
        return [*([model] if _exists(model) else []), *(path for _, path in sorted(candidates, reverse=True))]

    def replace(self, after: int, keep: Collection[str] = ()) -> None:
        """Move aside the files that this run replaces, and copy those that it continues and
        rewrites.

        Call `settle` before.

        Args:
            after: see `replaced_by`.
            keep: names of further files that a new run continues.
        """
        replacements = self.replaced_by(after)
        rewrites = [path for name in _REWRITTEN if (path := self.path / name).exists()]
        if not replacements and not rewrites:
            return
        try:
            self._write_state(after, complete=False)
            for path in rewrites:
                if after < 0 and path.name not in keep:
                    replacements.append(path)
                else:
                    _copy(path, _aside(path))
            for path in replacements:
                _aside(path).parent.mkdir(exist_ok=True)
                path.rename(_aside(path))
            self._write_state(after, complete=True)
        except OSError:
            self._take_back()
            raise

    def saved(self) -> None:
        """Delete the replaced files: this run has saved a whole checkpoint or model, or has ended
        well.

        The earlier model stays until there is a new one.
        """
        with self._mutex:
            (self.path / AGAIN).unlink(missing_ok=True)
            if self._state() is not None:
                earlier = self.path / ASIDE / "model"
                if _exists(earlier):
                    if _exists(self.path / "model"):
                        _remove(earlier)
                    else:
                        discard(self.path / BEFORE)
                        earlier.rename(self.path / BEFORE)
                for aside in self._asides():
                    discard(aside)
            if _exists(self.path / "model"):
                discard(self.path / BEFORE)

    def settle(self, keep: Collection[str] = ()) -> bool:
        """Complete or revert a replacement that an earlier run began.

        Args:
            keep: names of files of the earlier run that stay.

        Returns:
            Whether the files of the run before it were restored.
        """
        for leftover in (*(self.path / folder / ASIDE for folder in _BY_STEP), self.path / BEFORE):
            # A kill interrupted its deletion.
            shutil.rmtree(replaced(leftover), ignore_errors=True)
        if _exists(self.path / "model"):
            discard(self.path / BEFORE)
        if not any(self._asides()):
            return False
        state = self._state() or {"after": 0, "complete": False}
        if state["complete"] and self._has_saved(state["after"]):
            self.saved()
            return False
        if state["complete"]:
            rewrites = [self.path / name for name in _REWRITTEN if name not in keep]
            for path in [*self.replaced_by(state["after"]), *rewrites]:
                _remove(path)
            self._write_state(state["after"], complete=False)
        self._take_back()
        return True

    def _has_saved(self, after: int) -> bool:
        folder = self.path / "predictions"
        return any(path.parent != folder for path in self.replaced_by(after))

    def _take_back(self) -> None:
        """Restore the files that were moved aside.

        A file that is already in place is the same or was kept on purpose.
        """
        for aside in self._asides():
            for path in aside.iterdir():
                if path.name != _STATE and not _exists(aside.parent / path.name):
                    path.rename(aside.parent / path.name)
            shutil.rmtree(aside)

    def _asides(self) -> Iterator[Path]:
        """Yield the folders of files moved aside. The folder with the state comes last."""
        for folder in reversed(_BY_STEP):
            if (aside := self.path / folder / ASIDE).is_dir():
                yield aside

    def _state(self) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads((self.path / ASIDE / _STATE).read_text())
            return state
        except (OSError, ValueError):
            return None

    def _write_state(self, after: int, complete: bool) -> None:
        (self.path / ASIDE).mkdir(exist_ok=True)
        write_whole(self.path / ASIDE / _STATE, json.dumps({"after": after, "complete": complete}))


def inside(path: str | Path | None, replaced: Collection[Path]) -> Path | None:
    """Return the path among `replaced` that contains `path`, or None."""
    if not path:
        return None
    target = Path(path).resolve()
    return next((folder for folder in replaced if target.is_relative_to(folder.resolve())), None)


def _aside(path: Path) -> Path:
    return path.parent / ASIDE / path.name


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _copy(path: Path, target: Path) -> None:
    copy: Callable[[Path, Path], Any] = shutil.copytree if path.is_dir() else shutil.copy2
    copy(path, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
