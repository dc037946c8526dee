"""Checkpoints: our own format, and those that come from elsewhere."""

# Importing them registers their formats.
from sphinx_pl.checkpoints import gguf as gguf
from sphinx_pl.checkpoints import huggingface as huggingface
from sphinx_pl.checkpoints import meta as meta
from sphinx_pl.checkpoints import native as native
from sphinx_pl.checkpoints import original as original
from sphinx_pl.checkpoints import training as training
