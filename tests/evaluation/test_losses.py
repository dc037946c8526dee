from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.config import SourceConfig
from sphinx_pl.evaluation.losses import held_out_losses
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx


@pytest.fixture
def model(model_config: SphinxConfig) -> Sphinx:
    torch.manual_seed(0)
    return Sphinx(model_config)


PACKING = {"row_length": 256, "micro_batch_rows": 2, "images_per_row": 0, "weighting": "sqrt"}


@pytest.fixture
def module(processor: Processor, sample_data: Path) -> DataModule:
    sources = {"text": {"kind": "text", "path": str(sample_data / "text" / "val.jsonl")}}
    return DataModule(processor, {}, sources, PACKING)


def test_losses_do_not_depend_on_packing_and_equal_plain_sums(model: Sphinx, module: DataModule) -> None:
    loader = module.val_loaders()["text"]
    model.train()
    source = held_out_losses(model, {"text": loader})["text"]
    assert model.training, "the mode that it found"
    # The same samples, each alone in a row.
    texts = SourceConfig.from_dict("text", module.val_sources["text"]).open("text")
    samples = [module.processor.sample(texts.record(i), "text") for i in range(len(texts))]
    assert len(source.sums) == len(samples) > sum(len(batch.input_ids) for batch in loader), "packed rows"
    model.eval()
    with torch.no_grad():
        nll = [model.token_losses(module.collator([[sample]])).nll.double() for sample in samples]
    assert source.count == sum(len(values) for values in nll)
    assert source.mean == pytest.approx(float(torch.cat(nll).mean()), abs=1e-5)
    expected = torch.stack([values.sum() for values in nll]).sort().values
    torch.testing.assert_close(source.sums.sort().values, expected, atol=1e-3, rtol=1e-5)


def test_bf16_is_close_to_fp32_but_not_it(model: Sphinx, module: DataModule) -> None:
    loaders = {"text": list(module.val_loaders()["text"])}
    full, half = (held_out_losses(model, loaders, precision)["text"].mean for precision in ("fp32", "bf16"))
    assert full != half
    assert half == pytest.approx(full, rel=0.01)
