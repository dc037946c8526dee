"""LLaMA 1 to 3.3, TinyLlama, SmolLM 2, Yi and all others that use its class."""

from sphinx_pl.checkpoints.families.base import FAMILIES, Family

FAMILIES.register("llama", Family())
