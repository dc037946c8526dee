"""Training: one LightningModule; what tells the stages of the recipe apart is their YAML."""

from sphinx_pl.stages.stage import Stage

__all__ = ["Stage"]
