"""Answers on the disk while a model answers: a killed evaluation resumes, with the same or another
number of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sphinx_pl.utils.errors import UserError


@dataclass(frozen=True)
class AnsweredBatch:
    """The answers of a batch by their records' places, and the number of questions that could not
    be asked, by reason."""

    texts: Mapping[int, str]
    lost: Mapping[str, int]


class AnswerLog:
    """A file for each rank with a line for every answered batch. A line that a kill cut off does
    not count.

    Args:
        folder: where the files go.
        name: the name of this list of questions.
        settings: what answers depend on besides the questions, as JSON.
        overwrite: discard existing answers instead of resuming.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        self.name = name
        self.settings = dict(settings)
        self.overwrite = overwrite
        self._file: IO[bytes] | None = None

    def check(self) -> None:
        """Check that existing answers were made with these settings, before anything is loaded.

        Raises:
            UserError: they were not.
        """
        for path in [] if self.overwrite else sorted(self.folder.glob(f"{self.name}.rank*.jsonl")):
            if existing := next(_lines(path), None):
                self._compare(existing, self.settings | {"questions": existing.get("questions")})

    def open(self, questions: str, rank: int = 0, world_size: int = 1) -> dict[int, AnsweredBatch]:
        """The answered batches by their numbers. New ones go to this rank's file.

        Args:
            questions: a hash of the questions.
            rank: this process among `world_size`; an earlier evaluation may have had more.

        Raises:
            UserError: the folder's answers are to other questions, or were made with other
                settings.
        """
        head = self.settings | {"questions": questions}
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / f"{self.name}.rank{rank}.jsonl"
        done: dict[int, AnsweredBatch] = {}
        if self.overwrite:
            own.unlink(missing_ok=True)
            if rank == 0:  # a later start would resume the files of ranks that no longer exist
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

    def _read(self, path: Path, head: Mapping[str, Any]) -> dict[int, AnsweredBatch]:
        lines = _lines(path)
        existing = next(lines, None)
        if existing is None:
            return {}
        self._compare(existing, head)
        return {
            int(line["batch"]): AnsweredBatch({int(place): text for place, text in line["answers"]}, line["lost"])
            for line in lines
        }

    def _compare(self, existing: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        if existing != head:
            different = sorted(key for key in {*existing, *head} if existing.get(key) != head.get(key))
            raise UserError(
                f"'{self.folder}' holds answers with other settings ({', '.join(different)}): choose another out=, or "
                "overwrite=true to repeat the evaluation"
            )

    def append(self, number: int, batch: AnsweredBatch) -> None:
        """Write a batch to the disk; it survives a kill."""
        self._write({"batch": number, "answers": list(batch.texts.items()), "lost": dict(batch.lost)})

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
                raise UserError(
                    f"'{path}' is damaged: delete it, or repeat the evaluation with overwrite=true"
                ) from None
