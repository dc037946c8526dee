from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx

CONF = Path(__file__).parents[2] / "conf" / "model"


def model_config(name: str, *overrides: str) -> SphinxConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return SphinxConfig.from_dict(compose(name, overrides=list(overrides)))


@pytest.fixture
def sample() -> Sphinx:
    torch.manual_seed(0)
    return Sphinx(model_config("sphinx_sample")).eval()
