"""Lightning's W&B logger, with one W&B run for each run folder."""

from __future__ import annotations

import logging
import secrets
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from sphinx_pl.runtime import signals
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole

log = logging.getLogger(__name__)

FILE = "wandb_id"


class RunLogger(WandbLogger):
    """The W&B run of the run folder `save_dir`.

    Its id is stored in the folder, so a resumed run continues the same W&B run.

    train.py deletes the id when another run takes the folder.

    Args:
        name: the name of the run.
        point: the point of a sweep, which is added to the name; empty for none.
        id: replaces the folder's id.
    """

    def __init__(
        self, save_dir: str, name: str, point: str | None = None, id: str | None = None, **options: Any
    ) -> None:
        self._lost = False
        super().__init__(save_dir=save_dir, name=f"{name} {point}" if point else name, id=id, **options)

    def check(self) -> None:
        """Log in, if the run is online. In a terminal W&B asks for a missing key.

        Raises:
            UserError: there is no key, or W&B does not accept it.
        """
        import wandb

        if self._wandb_init.get("mode") in ("offline", "disabled"):
            return
        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise UserError(
                f"logger=wandb: {' '.join(str(error).split()).rstrip('.')}: run `wandb login` or set WANDB_API_KEY, "
                "or set logger.wandb.mode=offline and upload the run later with `wandb sync`"
            ) from None

    @property
    @rank_zero_experiment  # type: ignore[untyped-decorator]
    def experiment(self) -> Any:
        if self._id is None:  # type: ignore[has-type]
            self._id = self._wandb_init["id"] = run_id(Path(self._wandb_init["dir"]))
        return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self._tolerant():
            super().log_metrics(metrics, step)

    def log_table(self, *args: Any, **options: Any) -> None:
        with self._tolerant():
            super().log_table(*args, **options)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Ignore errors after a SIGTERM, which a scheduler sends to all processes: W&B's ends, and
        the run must still save.
        """
        try:
            yield
        except Exception as error:
            if not signals.received():
                raise
            if not self._lost:
                log.warning("W&B's process has ended (%s): later values are not logged there", error)
            self._lost = True


def run_id(folder: Path) -> str:
    """Return the id stored in a run folder. It is made if there is none."""
    path = folder / FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        alphabet = string.ascii_lowercase + string.digits
        # The id does not use `random`, whose state belongs to the run.
        write_whole(path, "".join(secrets.choice(alphabet) for _ in range(8)) + "\n")
    return path.read_text().strip()
