from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def golden() -> dict[str, list[Any]]:
    """Odd answers and what lmms-eval and LAVIS score them: tests/golden/make_scores.py names each entry's items."""
    path = Path(__file__).parents[2] / "golden" / "scores.json.gz"
    items: dict[str, list[Any]] = json.loads(gzip.decompress(path.read_bytes()))
    return items
