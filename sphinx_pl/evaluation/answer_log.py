"""Answers on the disk while a model is being asked: what was killed goes on, by the same or another number of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sphinx_pl.utils.errors import UserError


@dataclass(frozen=True)
class Answered:
    """A batch: place of each record -> answer, and how many could not be asked, by reason."""

    texts: Mapping[int, str]
    lost: Mapping[str, int]


class Journal:
    """A file for each rank, to which every answered batch is a line; a line that a kill cut off does not count.

    Args:
        folder: where the files go.
        name: of this list of questions.
        settings: what answers depend on besides the questions, as JSON.
        overwrite: forget what is there instead of going on.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        self.name = name
        self.settings = dict(settings)
        self.overwrite = overwrite
        self._file: IO[bytes] | None = None

    def check(self) -> None:
        """Whether answers that are there were made with these settings; called before anything is loaded.

        Raises:
            UserError: they were not.
        """
        for path in [] if self.overwrite else sorted(self.folder.glob(f"{self.name}.rank*.jsonl")):
            if there := next(_lines(path), None):
                self._compare(there, self.settings | {"questions": there.get("questions")})

    def open(self, questions: str, rank: int = 0, world_size: int = 1) -> dict[int, Answered]:
        """The answered batches by their numbers; new ones go to this rank's file.

        Args:
            questions: a hash of them.
            rank: of this process among `world_size` that answer; there may have been more of them before.

        Raises:
            UserError: the folder's answers are to other questions, or were made with other settings.
        """
        head = self.settings | {"questions": questions}
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / f"{self.name}.rank{rank}.jsonl"
        done: dict[int, Answered] = {}
        if self.overwrite:
            own.unlink(missing_ok=True)
            if rank == 0:  # those of ranks that are no more, which a later start would go on with
                for path in self.folder.glob(f"{self.name}.rank*.jsonl"):
                    if int(path.name.removesuffix(".jsonl").rpartition(".rank")[2]) >= world_size:
                        path.unlink()
        else:
            for path in sorted(self.folder.glob(f"{self.name}.rank*.jsonl")):
                done |= self._read(path, head)
        self._file = own.open("r+b" if own.exists() else "w+b")
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write(head)
        return done

    def _read(self, path: Path, head: Mapping[str, Any]) -> dict[int, Answered]:
        lines = _lines(path)
        there = next(lines, None)
        if there is None:
            return {}
        self._compare(there, head)
        return {
            int(line["batch"]): Answered({int(place): text for place, text in line["answers"]}, line["lost"])
            for line in lines
        }

    def _compare(self, there: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        if there != head:
            different = sorted(key for key in {*there, *head} if there.get(key) != head.get(key))
            raise UserError(
                f"'{self.folder}' holds answers with other settings ({', '.join(different)}): choose another out=, or "
                "overwrite=true to ask anew"
            )

    def note(self, batch: int, answered: Answered) -> None:
        """Keep a batch, whatever happens from now on."""
        self._write({"batch": batch, "answers": list(answered.texts.items()), "lost": dict(answered.lost)})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                yield json.loads(line)
            except ValueError:
                raise UserError(f"'{path}' is damaged: delete it, or ask anew with overwrite=true") from None
