"""LightningModules: one per stage of the recipe."""

from sphinx_pl.stages.base import Stage
from sphinx_pl.stages.finetune import FinetuneStage
from sphinx_pl.stages.pretrain import PretrainStage

__all__ = ["FinetuneStage", "PretrainStage", "Stage"]
