"""Pretraining on image-text pairs, real or synthetic, with text-only data in every step (SPHINX, section 3.1)."""

from __future__ import annotations

from typing import Any

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.errors import UserError
from sphinx_pl.stages.base import Stage


class PretrainStage(Stage):
    """The LLM and the projections train; language survives since no step is without text.

    Args:
        text_required: refuse a mixture without text-only data. Off only to measure what the text is good for.
    """

    def __init__(self, *args: Any, text_required: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_required = text_required

    def on_fit_start(self) -> None:
        datamodule: DataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        mixture = datamodule.planner().mixture
        if self.text_required and "text" not in mixture.modalities:
            raise UserError(
                "data.sources has no text-only source, which pretraining needs in every step to keep the language ability: "
                "add one, or set stage.text_required=false"
            )
