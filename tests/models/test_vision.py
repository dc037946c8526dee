"""Views, towers and the mixer on small real towers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sphinx_pl.models.config import ConvNextConfig
from sphinx_pl.models.encoders import ConvNext, resample_positions
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.models.views import CLIP_MEAN, CLIP_STD, normalise, resize, split_views
from sphinx_pl.models.vision import VisionMixer, merge_patches
from sphinx_pl.utils.errors import UserError
from tests.models.conftest import model_config


def test_views_are_the_whole_then_crops_row_by_row() -> None:
    pixels = torch.rand(2, 3, 63, 63)
    views = split_views(pixels, size=21, grid=3)
    assert views.shape == (2, 10, 3, 21, 21)
    for row in range(3):
        for column in range(3):
            crop = pixels[:, :, row * 21 : row * 21 + 21, column * 21 : column * 21 + 21]
            assert torch.equal(views[:, 1 + row * 3 + column], crop)
    whole = torch.nn.functional.interpolate(pixels, size=(21, 21), mode="bicubic", align_corners=False)
    assert torch.equal(views[:, 0], whole)


def test_half_resize_rounds_only_what_is_resized() -> None:
    pixels = torch.rand(1, 3, 32, 32)
    views = split_views(pixels, size=16, grid=2, half=True)
    assert torch.equal(views[:, 0], views[:, 0].half().float())
    assert torch.equal(views[:, 1], pixels[:, :, :16, :16])
    assert resize(pixels, 32, half=True) is pixels


def test_crops_are_cut_from_the_resized_image() -> None:
    pixels = torch.rand(1, 3, 64, 64)
    views = split_views(pixels, size=14, grid=2)
    assert views.shape == (1, 5, 3, 14, 14)
    whole = torch.nn.functional.interpolate(pixels, size=(28, 28), mode="bicubic")
    assert torch.equal(views[:, 2], whole[:, :, :14, 14:])


def test_normalise_maps_clips_mean_to_zero() -> None:
    pixels = (torch.tensor(CLIP_MEAN) * 255).round().to(torch.uint8)[None, :, None, None].expand(1, 3, 4, 4)
    assert normalise(pixels).abs().max() < 0.5 / 255 / min(CLIP_STD) + 1e-6
    white = normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert white.tolist() == pytest.approx([(1 - m) / s for m, s in zip(CLIP_MEAN, CLIP_STD, strict=True)])


def test_merge_patches() -> None:
    tokens = torch.arange(17.0)[None, :, None]  # class 0, then a 4 x 4 grid of 1 ... 16
    assert merge_patches(tokens, "none", 2) is tokens
    assert merge_patches(tokens, "mean", 2).flatten().tolist() == [0.0, 3.5, 5.5, 11.5, 13.5]
    assert merge_patches(tokens, "shuffle", 2)[0].tolist() == [
        [0, 0, 0, 0], [1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16],
    ]  # fmt: skip


def test_convnext_map_is_repeated_behind_its_mean() -> None:
    tower = ConvNext(ConvNextConfig(image_size=32, depths=[1, 1], dims=[8, 16]), patch_grid=8).eval()
    out = tower(torch.randn(2, 3, 40, 40))
    assert out.shape == (2, 65, 16)
    grid = out[:, 1:].unflatten(1, (4, 2, 4, 2))
    assert torch.equal(grid, grid[:, :, :1, :, :1].expand_as(grid))
    assert not torch.equal(grid[:, 0], grid[:, 1])
    torch.testing.assert_close(out[:, 0], out[:, 1:].mean(dim=1))


def test_convnext_that_timm_cannot_build_is_refused() -> None:
    with pytest.raises(UserError, match="stem=2"):
        ConvNext(ConvNextConfig(image_size=32, depths=[1, 1], dims=[8, 16], stem=2), patch_grid=8)


def test_qformer_has_no_dropout_and_distinct_queries(sample: Sphinx) -> None:
    assert sample.mixer is not None
    tower = sample.mixer.towers["qformer"].train()
    pixels = torch.randn(1, 3, 64, 64)
    first = tower(pixels)
    assert torch.equal(first, tower(pixels))
    assert (first[0, 0] - first[0, 1]).abs().max() > 0.01


def test_every_parameter_gets_a_gradient(sample: Sphinx) -> None:
    assert sample.mixer is not None
    sample.mixer(torch.randn(2, 3, 64, 64)).square().mean(dim=(0, 1)).mul(torch.randn(192)).sum().backward()
    assert [name for name, p in sample.mixer.named_parameters() if p.grad is None] == []


def test_mixer_order_and_view_order() -> None:
    torch.manual_seed(0)
    config = model_config("sphinx_sample_1k")
    assert config.vision is not None
    mixer = VisionMixer(config.vision, 32).eval()
    pixels = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        out = mixer(pixels).unflatten(1, (5, 27))
        third = mixer.towers["qformer"](pixels[:, :, 64:, :64])
        clip, convnext, dinov2 = (mixer.towers[k](pixels[:, :, 64:, :64]) for k in ("clip", "convnext", "dinov2"))
        visual = mixer.visual_proj(merge_patches(torch.cat([clip, convnext, dinov2], dim=-1), "shuffle", 2))
    assert torch.equal(out[:, :, 0], mixer.start_img.expand(2, 5, -1))
    assert torch.equal(out[:, :, -1], mixer.end_img.expand(2, 5, -1))
    torch.testing.assert_close(out[:, 3, 1:9], mixer.qformer_proj(third), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, 3, 9:26], visual, atol=1e-5, rtol=1e-5)


def test_only_sub_images_are_pooled_where_the_overview_keeps_its_patches() -> None:
    """LLaMA2-Accessory's llama_ens5p2: pooled before the projection, here 8 + 1 + 16 tokens of a crop instead of 73."""
    torch.manual_seed(0)
    overrides = ("vision.merge=mean", "vision.merge_factor=2", "+vision.merge_overview=false")
    config = model_config("sphinx_sample_1k", *overrides).vision
    whole = model_config("sphinx_sample_1k", "vision.merge=none").vision
    assert config is not None
    assert whole is not None
    assert config.tokens_per_image == (2 + 8 + 65) + 4 * (2 + 8 + 17)
    mixer, unmerged = VisionMixer(config, 32).eval(), VisionMixer(whole, 32).eval()
    unmerged.load_state_dict(mixer.state_dict())
    pixels = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        out, long = mixer(pixels), unmerged(pixels)
        torch.testing.assert_close(out[:, :75], long[:, :75])
        seen = [mixer.encode(mixer.towers[key], pixels)[4::5, 1:] for key in ("clip", "convnext", "dinov2")]
        maps = torch.cat(seen, dim=-1).transpose(1, 2).unflatten(2, (8, 8))
        pooled = torch.nn.functional.interpolate(maps, scale_factor=0.5, mode="bilinear").flatten(2).transpose(1, 2)
        torch.testing.assert_close(out[:, -17:-1], mixer.visual_proj(pooled))
        torch.testing.assert_close(out[:, -27:-18], long[:, -75:-66])


@pytest.mark.parametrize("merge", ["shuffle", "mean"])
def test_views_that_are_padding_cost_one_token_and_no_encoder(merge: str) -> None:
    torch.manual_seed(0)
    overrides = [f"vision.merge={merge}", "+vision.merge_overview=false"] if merge == "mean" else []
    overrides += ["vision.image_size=192", "vision.grid=3", "+vision.skip_padding=true"]
    config = model_config("sphinx_sample_1k", *overrides).vision
    assert config is not None
    mixer, pixels = VisionMixer(config, 32).eval(), torch.randn(2, 3, 192, 192)
    seen = torch.ones(2, 10, dtype=torch.bool)
    seen[0, [1, 4]] = False
    encoded: list[int] = []
    mixer.towers["clip"].register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    with torch.no_grad():
        whole, tokens = mixer(pixels), mixer(pixels, seen)
    assert encoded == [20, 18]
    first = list(torch.split(whole[0], config.view_tokens))
    for view in (1, 4):
        first[view] = mixer.skip_token[None]
    torch.testing.assert_close(tokens, torch.cat([*first, whole[1]]))


def test_skipping_needs_sub_images() -> None:
    with pytest.raises(UserError, match=r"model\.vision\.grid"):
        model_config("sphinx_sample_1k", "+vision.skip_padding=true")


@pytest.mark.parametrize("off", [["clip"], ["convnext"], ["dinov2"], ["qformer"], ["clip", "convnext", "dinov2"],
                                 ["clip", "dinov2", "qformer"]], ids=",".join)  # fmt: skip
def test_any_subset_of_towers(off: list[str]) -> None:
    config = model_config("sphinx_sample", *[f"vision.{key}=null" for key in off])
    assert config.vision is not None
    mixer = VisionMixer(config.vision, 16)
    assert set(mixer.towers) == {"clip", "convnext", "dinov2", "qformer"} - set(off)
    assert mixer(torch.randn(1, 3, 64, 64)).shape == (1, config.tokens_per_image, 16)


def test_clip_matches_open_clip_and_quick_gelu_differs(sample: Sphinx) -> None:
    assert sample.mixer is not None
    tower = sample.mixer.towers["clip"]
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole = tower.model.ln_post(tower.model.transformer(tower.model._embeds(pixels)))
        torch.testing.assert_close(tower(pixels), whole)
    exact = Sphinx(model_config("sphinx_sample", "vision.clip.quick_gelu=false"))
    assert exact.mixer is not None
    exact.load_state_dict(sample.state_dict())
    assert (exact.mixer.towers["clip"](pixels) - whole).abs().max() > 1e-4


def test_dinov2_sees_imagenets_normalisation(sample: Sphinx) -> None:
    """A picture of ImageNet's mean colour is all zeros to it."""
    assert sample.mixer is not None
    tower = sample.mixer.towers["dinov2"]
    mean = torch.tensor([0.485, 0.456, 0.406])
    pixels = ((mean - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))[None, :, None, None].expand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), tower.model.forward_features(torch.zeros(1, 3, 64, 64)))


def test_positions_keep_their_class_row_and_constants() -> None:
    positions = torch.cat([torch.full((1, 1, 4), 7.0), torch.full((1, 37 * 37, 4), 2.0)], dim=1)
    out = resample_positions(positions, 16)
    assert out.shape == (1, 257, 4)
    assert torch.equal(out[:, 0], positions[:, 0])
    torch.testing.assert_close(out[:, 1:], torch.full((1, 256, 4), 2.0))
    assert resample_positions(out, 16) is out


def test_flops_of_each_tower(sample: Sphinx) -> None:
    sample.requires_grad_(False)
    assert sample.mixer is not None
    for tower in sample.mixer.towers.values():
        # Plain matmuls: the counter of torch 2.11 does not know the CPU's fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tower(torch.randn(1, 3, 64, 64))
        assert tower.flops() == pytest.approx(counter.get_total_flops(), rel=0.03), tower.key


def half(pixels: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    return F.interpolate(pixels.half(), size=(size, size), mode=mode).float()


def quarters(pixels: Tensor) -> list[Tensor]:
    n = pixels.shape[-1] // 2
    return [pixels[..., :n, :n], pixels[..., :n, n:], pixels[..., n:, :n], pixels[..., n:, n:]]


# What each tower's first layer gets in the original, as its code resizes and cuts: {tower: views of an image}.
ORIGINAL_VIEWS = {
    "sphinx_7b": lambda x: {"convnext": [half(x, 256, "nearest")], "clip": [x]},
    "sphinx_1k_13b": lambda x: {
        "convnext": [half(view, 256, "nearest") for view in (half(x, 224), *quarters(x))],
        "clip": [half(x, 224), *quarters(x)],
    },
    "sphinx_tiny": lambda x: {"convnext": [half(x, 512)], "dinov2": [half(x, 224)]},
    "sphinx_tiny_1k": lambda x: {
        "convnext": [half(x, 512), *quarters(x)],
        "dinov2": [half(x, 224), *quarters(half(x, 448))],
    },
    "sphinx_moe": lambda x: {"convnext": [half(x, 512)], "clip": [half(x, 224)]},
    "sphinx_moe_1k": lambda x: {
        "convnext": [half(x, 512), *quarters(x)],
        "qformer": [half(x, 224), *quarters(half(x, 448))],
    },
}


@pytest.mark.parametrize("name", ORIGINAL_VIEWS)
def test_towers_get_the_originals_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the released models, the towers themselves small."""
    tiny = {"width": 8, "layers": 1, "heads": 1}
    config = model_config(name).vision
    assert config is not None
    small = {key: dataclasses.replace(tower, **tiny) for key in ("clip", "dinov2") if (tower := getattr(config, key))}
    assert config.convnext is not None
    small["convnext"] = dataclasses.replace(config.convnext, dims=[2, 2, 2, 8], depths=[0, 0, 0, 0])
    if config.qformer:
        sizes = tiny | {"vision_width": 8, "vision_layers": 1, "vision_heads": 1}
        small["qformer"] = dataclasses.replace(config.qformer, **sizes)
    mixer = VisionMixer(dataclasses.replace(config, **small), 4)
    seen: dict[str, Tensor] = {}
    for key, tower in mixer.towers.items():
        encode = tower.encode
        monkeypatch.setattr(
            tower, "encode", lambda pixels, key=key, encode=encode: encode(seen.setdefault(key, pixels))
        )
    pixels = Sphinx.normalise(torch.randint(0, 256, (2, 3, config.image_size, config.image_size), dtype=torch.uint8))
    with torch.no_grad():
        assert mixer(pixels).shape[:2] == (2, config.tokens_per_image)
    for key, views in ORIGINAL_VIEWS[name](pixels).items():
        assert torch.equal(seen[key], torch.stack(views, dim=1).flatten(0, 1)), key
