from __future__ import annotations

from tests.models.conftest import model, prompts, sample  # noqa: F401
