"""The models of tests/models, which generate here."""

from tests.models.conftest import model, prompts, sample

__all__ = ["model", "prompts", "sample"]
