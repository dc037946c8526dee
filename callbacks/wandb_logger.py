"""Lightning's W&B logger, with one W&B run for each run folder."""

from __future__ import annotations

import secrets
import string
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from sphinx_pl import stop
from sphinx_pl.files import write_whole

FILE = "wandb_id"


class RunLogger(WandbLogger):
    """The W&B run of the run folder `save_dir`: its id is made once and kept there, so a run that is continued goes
    on in the same one. train.py forgets it where another run takes the folder.

    Args:
        name: of the run.
        point: of a sweep, part of the name; empty for none.
        id: instead of the folder's.
    """

    def __init__(
        self, save_dir: str, name: str, point: str | None = None, id: str | None = None, **options: Any
    ) -> None:
        super().__init__(save_dir=save_dir, name=f"{name} {point}" if point else name, id=id, **options)

    @property
    @rank_zero_experiment  # type: ignore[untyped-decorator]
    def experiment(self) -> Any:
        if self._id is None:  # type: ignore[has-type]
            self._id = self._wandb_init["id"] = run_id(Path(self._wandb_init["dir"]))
        if self._experiment is not None:  # type: ignore[has-type]
            return super().experiment
        with stop.shielded():  # W&B's own process would end at once, and lose what it has not sent
            return super().experiment


def run_id(folder: Path) -> str:
    """The id that is kept in a run folder, made if there is none."""
    path = folder / FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        alphabet = string.ascii_lowercase + string.digits
        # Not from `random`, whose state belongs to the run.
        write_whole(path, "".join(secrets.choice(alphabet) for _ in range(8)) + "\n")
    return path.read_text().strip()
