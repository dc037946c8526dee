"""Every shipped model, narrowed, from its own folder: it trains, answers and is evaluated within its own limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.runner import evaluate
from sphinx_pl.generation.assistant import Assistant, Dialog
from sphinx_pl.generation.generate import GenerationConfig
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER
from tests.conftest import REPOSITORY

MODELS = sorted({path.stem for path in (CONFIG_FOLDER / "model").glob("*.yaml")} - {"auto"})
NARROW: dict[str, dict[str, Any]] = {
    "clip": {"width": 16, "layers": 1, "heads": 1},
    "convnext": {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]},
    "dinov2": {"width": 16, "layers": 1, "heads": 1, "mlp_ratio": 4.0},
    "qformer": {"vision_width": 16, "vision_layers": 1, "vision_heads": 1, "vision_ffn_width": 16}
    | {"width": 16, "layers": 1, "heads": 1, "ffn_width": 16},
    "timm": {"args": {"embed_dim": 16, "depth": 1, "num_heads": 1}},
}


def narrowed(name: str) -> SphinxConfig:
    """The images, views, tokens, positions and experts of a model, in narrow layers."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("train", [f"model={name}"]).model, resolve=True)
    decoder = values["decoder"]
    decoder |= {"vocab_size": 512, "width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_width": 16, "load": None}
    for key, sizes in values["vision"]["encoders"].items():
        if sizes:
            # EfficientNet has no sizes to choose, and is small.
            narrow = {} if "efficientnet" in sizes.get("name", "") else NARROW[sizes.get("kind", key)]
            sizes |= narrow | {"load": None}
    return SphinxConfig.from_dict(values)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_answers_and_is_evaluated_within_its_own_limits(name: str, tmp_path: Path) -> None:
    config = narrowed(name)
    assert config.vision is not None
    torch.manual_seed(0)
    tokenizer = REPOSITORY / "tests" / "golden" / "tokenizer.model"
    processor = Processor.from_dict({"max_length": None}, tokenizer, config)
    folder = write_checkpoint(
        tmp_path / "model", Sphinx(config).state_dict(), config.to_dict(), processor.to_dict(), tokenizer, {}
    )
    Image.effect_mandelbrot((120, 50), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / "a.png")
    record = Record("k", "short_vqa", (ImageRef(str(tmp_path / "a.png")),), question="What is it?", answer="a dog")

    assistant = Assistant.load(folder, device="cpu")
    model, processor = assistant.model, assistant.processor
    sample = processor.sample(record, "s")
    [batch] = [Collator(sample.length, config.vision.image_size)([[sample]])]
    model.train()
    for part in ("decoder", "projections"):
        for parameter in model.part_parameters()[part]:
            parameter.requires_grad_(True)
    losses = model.token_losses(batch)
    (losses.nll.sum() + losses.extra).backward()
    assert torch.isfinite(losses.nll).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.layers.parameters())

    model.eval()
    short = GenerationConfig(max_new_tokens=2)
    [text] = assistant.generate([Dialog("What is it?", images=[str(tmp_path / "a.png")])], short)
    assert isinstance(text, str)
    skipped: dict[str, int] = {}
    predictions = evaluate(model, processor, [record], max_new_tokens=2, skipped=skipped, progress=False)
    assert (len(predictions), skipped) == (1, {})
