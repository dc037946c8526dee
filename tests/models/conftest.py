from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from sphinx_pl.data.schema import IMAGE_SLOT
from sphinx_pl.generation.prompt import Prompt
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


@pytest.fixture
def model(sample: Sphinx) -> Sphinx:
    for parameter in sample.decoder.layers.parameters():  # the initial weights would repeat one token
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return sample


@pytest.fixture
def prompts() -> list[Prompt]:
    draw = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (2, 3, 64, 64), generator=draw, dtype=torch.uint8)
    slots = [IMAGE_SLOT] * 27
    return [
        Prompt([1, *slots, 17, 20], image[:1]),
        Prompt([1, 40, 41, 42, 43, 44, 45]),
        Prompt([1, *slots, 30, *slots, 31, 32], image),
        Prompt([1]),
    ]
