"""Checkpoints: our own format, and those that come from elsewhere."""

from sphinx_pl.checkpoints import llama as llama  # registers its formats
from sphinx_pl.checkpoints import original as original
from sphinx_pl.checkpoints import training as training
