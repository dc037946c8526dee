"""Training: one LightningModule. The stages of the recipe differ only in their YAML."""

from sphinx_pl.stages.stage import Stage

__all__ = ["Stage"]
