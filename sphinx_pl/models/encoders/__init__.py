"""Kinds of vision encoders, a file each, found by being in this folder.

A file holds everything about its kind: module, configuration, normalisation, how its tokens are
joined with those of others, their number, FLOPs, and the names of its tensors in published files.
`base.py` says what a kind consists of; docs/extending.md adds one.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
