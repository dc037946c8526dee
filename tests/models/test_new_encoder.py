"""A fifth encoder in one class: it trains, is planned, exported, and reads released weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sphinx_pl.callbacks.export import ExportModel
from sphinx_pl.checkpoints.encoders import load_pretrained
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.encoders.base import ENCODERS, Encoder, ViewScheme, ViTConfig, register, vit_flops
from sphinx_pl.models.published import OURS, PublishedLayout, behind
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.models.vision import build_encoder
from sphinx_pl.planning.flops import TrainingFlops
from sphinx_pl.planning.memory import Run, Shape, micro_batches
from sphinx_pl.stages import Stage
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY, tiny_model

# docs/extending.md quotes the lines between the marks.
# [example


@dataclass
class SigLIPConfig(ViTConfig):
    """The sizes of SigLIP's ViT (Zhai et al. 2023)."""


@register("siglip", SigLIPConfig)
class SigLIP(Encoder):
    """SigLIP has no class token: the mean of its patches stands in its place."""

    mean = std = (0.5, 0.5, 0.5)
    timm_models = "vit_*_siglip_*"
    published = (OURS, PublishedLayout("timm", behind(""), (r"attn_pool\..+",)))
    config: SigLIPConfig

    def __init__(self, config: SigLIPConfig, scheme: ViewScheme | None = None) -> None:
        super().__init__(config, scheme)
        sizes = {"embed_dim": config.width, "depth": config.layers, "num_heads": config.heads}
        sizes |= {"img_size": config.image_size, "patch_size": config.patch_size}
        self.model = timm.create_model("vit_base_patch16_siglip_224", global_pool="", num_classes=0, **sizes)

    def encode(self, views: Tensor) -> Tensor:
        patches = self.model(views)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)

    def blocks(self) -> Iterable[nn.Module]:
        return list(self.model.blocks)

    def flops(self) -> float:
        c = self.config
        return vit_flops(c.grid, c.patch_size, c.width, c.layers, mlp_weights=8 * c.width**2)


# example]

KINDS: Any = ENCODERS._entries
KINDS.pop("siglip")  # other tests know the kinds in the folder
SIZES = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 2}
PARTS = ["decoder", "projections", "siglip"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "siglip", SigLIP)


@pytest.fixture
def config() -> SphinxConfig:
    """The tiny model with five encoders."""
    values = tiny_model().to_dict()
    values["vision"]["encoders"]["siglip"] = SIZES
    return SphinxConfig.from_dict(values)


def train(config: SphinxConfig, processor: Processor, data: Path, folder: Path) -> Stage:
    torch.manual_seed(0)
    optim = {"lr": 1e-3, "warmup": 0.0, "lr_scale": {"siglip": 0.5}}
    stage = Stage(config, "test", PARTS, optim, max_steps=2)
    sources = {
        "real": {"kind": "image_text", "path": f"{data}/real/train-*.tar", "weight": 0.7},
        "text": {"kind": "text", "path": f"{data}/text/train.jsonl", "weight": 0.3},
    }
    module = DataModule(processor, sources, {}, {"row_length": 96, "micro_batch_rows": 4}, workers=0)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": folder}
    export = ExportModel(str(folder / "model"))
    L.Trainer(**options, max_steps=2, max_epochs=-1, log_every_n_steps=1, callbacks=[export]).fit(stage, module)
    return stage


def test_it_trains_and_its_checkpoint_comes_back(
    config: SphinxConfig, processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    stage = train(config, processor, sample_data, tmp_path)
    torch.manual_seed(0)
    start = Stage(config, "test", PARTS, {"lr": 1e-3, "warmup": 0.0}, max_steps=2)
    start.configure_model()
    before = start.sphinx.state_dict()
    moved = {
        name.split(".")[2]
        for name, value in stage.sphinx.state_dict().items()
        if ".towers." in name and not torch.equal(value, before[name])
    }
    assert moved == {"siglip"}
    [group] = {group["lr_scale"] for group in stage.optimizers().param_groups if group.get("lr_scale", 1.0) != 1.0}  # type: ignore[union-attr]
    assert group == 0.5

    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.model_config == config
    following = Stage(
        config, "test", PARTS, {"lr": 1e-3, "warmup": 0.0}, max_steps=1, init_from=str(tmp_path / "model")
    )
    following.configure_model()
    for (name, a), b in zip(stage.named_parameters(), following.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_it_is_planned(config: SphinxConfig) -> None:
    assert config.vision is not None
    width = config.decoder.width
    without = dataclasses.replace(config.vision, encoders={**config.vision.encoders, "siglip": None})
    [more, less] = (
        TrainingFlops(Sphinx(dataclasses.replace(config, vision=vision))).per_image
        for vision in (config.vision, without)
    )
    joined = 2 * config.vision.patch_tokens(config.vision.merge) * 4 * SIZES["width"] * width
    assert more - less == 3 * (build_encoder(config.vision, "siglip").flops() + joined)
    run = Run(("decoder", "projections"), "32-true", gpu=False)
    shape = Shape(rows=1, length=64, supervised=32.0, images=1.0)
    frozen, trained = (
        micro_batches(config, shape, dataclasses.replace(run, train_parts=parts)).peaks(1)
        for parts in (run.train_parts, (*run.train_parts, "siglip"))
    )
    assert sum(trained["head"].values()) > sum(frozen["head"].values())


def test_it_sees_its_own_normalisation(config: SphinxConfig) -> None:
    assert config.vision is not None
    pixels = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 32, 32)
    views = build_encoder(config.vision, "siglip").views(pixels)
    assert torch.equal(views[:, 0].flatten(1).unique(dim=1), torch.tensor([[-1.0], [1.0]]))


def test_it_reads_timms_weights(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    released = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **sizes).eval()
    save_file(released.state_dict(), tmp_path / "siglip.safetensors")
    encoder = SigLIP(SigLIPConfig(**SIZES)).eval()
    load_pretrained(encoder, str(tmp_path / "siglip.safetensors"))
    views = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(views)[:, 1:], released.forward_features(views))


def test_its_keys_are_checked_like_those_of_the_others() -> None:
    values = tiny_model().to_dict()
    values["vision"]["encoders"]["siglip"] = SIZES | {"layer": 3}
    with pytest.raises(
        UserError, match=r"no key model\.vision\.encoders\.siglip\.layer: did you mean .*siglip\.layers"
    ):
        SphinxConfig.from_dict(values)
    values["vision"]["encoders"]["siglip"] = SIZES | {"patch_size": 16}
    with pytest.raises(UserError, match=r"clip has a 4x4 grid but siglip 2x2"):
        SphinxConfig.from_dict(values)


def test_no_other_file_names_a_kind() -> None:
    """`stage.clip` is about gradients, and mixing's rules recognise other people's models by these words."""
    words = re.compile(r"convnext|dinov2|q-?former|(vision|encoders|towers)\W+clip\b", re.IGNORECASE)
    named = {
        f"{path.relative_to(REPOSITORY)}:{number}"
        for folder in ("sphinx_pl", "callbacks")
        for path in (REPOSITORY / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    }
    assert {
        place for place in named if not place.startswith(("sphinx_pl/models/encoders/", "sphinx_pl/mixing/rules"))
    } == set()
