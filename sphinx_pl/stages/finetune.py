"""Finetuning on many tasks at once; task-specific instructions keep them apart (SPHINX, section 3.1)."""

from __future__ import annotations

from sphinx_pl.stages.base import Stage


class FinetuneStage(Stage):
    """As pretraining, from mixed weights, on instruction data; losses are reported per task."""
