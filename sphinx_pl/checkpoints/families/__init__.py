"""Families of language models in Hugging Face's layout, a file each, found by being in this folder.

A family names its tensors and says what each key of its config.json means, in both directions. A
key that changes what a model computes and that nothing here computes is refused by name.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from sphinx_pl.checkpoints.families.base import FAMILIES, Family, family_of

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "Family", "family_of"]
