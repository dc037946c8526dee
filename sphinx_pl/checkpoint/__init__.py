"""Checkpoints: our own format, and those that come from elsewhere."""

from sphinx_pl.checkpoint import llm as llm  # registers its formats
from sphinx_pl.checkpoint import original as original
from sphinx_pl.checkpoint import training as training
