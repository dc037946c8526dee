"""Views, and mixed visual embeddings of small real encoders."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sphinx_pl.models.encoders.base import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, ViewScheme
from sphinx_pl.models.encoders.convnext import ConvNext, ConvNextConfig
from sphinx_pl.models.encoders.dinov2 import Dinov2, Dinov2Config, resample_positions
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.models.views import normalise, resize, split_views
from sphinx_pl.models.vision import MixedVisionEncoder, merge_patches
from sphinx_pl.utils.errors import UserError
from tests.models.conftest import model_config


def images(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


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
    assert normalise(pixels, CLIP_MEAN, CLIP_STD).abs().max() < 0.5 / 255 / min(CLIP_STD) + 1e-6
    white = normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8), CLIP_MEAN, CLIP_STD).flatten()
    assert white.tolist() == pytest.approx([(1 - m) / s for m, s in zip(CLIP_MEAN, CLIP_STD, strict=True)])


def test_merge_patches() -> None:
    tokens = torch.arange(17.0)[None, :, None]  # class 0, then a 4 x 4 grid of 1 ... 16
    assert merge_patches(tokens, "none", 2) is tokens
    assert merge_patches(tokens, "mean", 2).flatten().tolist() == [0.0, 3.5, 5.5, 11.5, 13.5]
    assert merge_patches(tokens, "shuffle", 2)[0].tolist() == [
        [0, 0, 0, 0], [1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16],
    ]  # fmt: skip


def test_convnext_map_is_repeated_behind_its_mean() -> None:
    encoder = ConvNext(ConvNextConfig(image_size=32, depths=[1, 1], dims=[8, 16]), ViewScheme(patch_grid=8)).eval()
    out = encoder(torch.randn(2, 3, 40, 40))
    assert out.shape == (2, 65, 16)
    grid = out[:, 1:].unflatten(1, (4, 2, 4, 2))
    assert torch.equal(grid, grid[:, :, :1, :, :1].expand_as(grid))
    assert not torch.equal(grid[:, 0], grid[:, 1])
    torch.testing.assert_close(out[:, 0], out[:, 1:].mean(dim=1))


def test_convnext_that_timm_cannot_build_is_refused() -> None:
    with pytest.raises(UserError, match="stem=2"):
        ConvNext(ConvNextConfig(image_size=32, depths=[1, 1], dims=[8, 16], stem=2))


def test_qformer_has_no_dropout_and_distinct_queries(sample: Sphinx) -> None:
    assert sample.mixer is not None
    encoder = sample.mixer.towers["qformer"].train()
    pixels = torch.randn(1, 3, 64, 64)
    first = encoder(pixels)
    assert torch.equal(first, encoder(pixels))
    assert (first[0, 0] - first[0, 1]).abs().max() > 0.01


def test_every_parameter_gets_a_gradient(sample: Sphinx) -> None:
    assert sample.mixer is not None
    sample.mixer(images(2, 64)).square().mean(dim=(0, 1)).mul(torch.randn(192)).sum().backward()
    assert [name for name, p in sample.mixer.named_parameters() if p.grad is None] == []


def test_mixer_order_and_view_order() -> None:
    torch.manual_seed(0)
    config = model_config("sphinx_sample_1k")
    assert config.vision is not None
    mixer = MixedVisionEncoder(config.vision, 32).eval()
    pixels = images(2, 128)
    with torch.no_grad():
        out = mixer(pixels).unflatten(1, (5, 27))
        crop = {kind: encoder(encoder.views(pixels)[:, 3]) for kind, encoder in mixer.encoders.items()}
        clip, convnext, dinov2, third = (crop[kind] for kind in ("clip", "convnext", "dinov2", "qformer"))
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
    mixer, unmerged = MixedVisionEncoder(config, 32).eval(), MixedVisionEncoder(whole, 32).eval()
    unmerged.load_state_dict(mixer.state_dict())
    pixels = images(2, 128)
    with torch.no_grad():
        out, long = mixer(pixels), unmerged(pixels)
        torch.testing.assert_close(out[:, :75], long[:, :75])
        seen = [mixer.encode(mixer.encoders[key], pixels)[4::5, 1:] for key in ("clip", "convnext", "dinov2")]
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
    mixer, pixels = MixedVisionEncoder(config, 32).eval(), images(2, 192)
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
def test_any_subset_of_encoders(off: list[str]) -> None:
    config = model_config("sphinx_sample", *[f"vision.encoders.{key}=null" for key in off])
    assert config.vision is not None
    mixer = MixedVisionEncoder(config.vision, 16)
    assert set(mixer.towers) == {"clip", "convnext", "dinov2", "qformer"} - set(off)
    assert mixer(images(1, 64)).shape == (1, config.tokens_per_image, 16)


def test_clip_matches_open_clip_and_quick_gelu_differs(sample: Sphinx) -> None:
    assert sample.mixer is not None
    encoder = sample.mixer.towers["clip"]
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole = encoder.model.ln_post(encoder.model.transformer(encoder.model._embeds(pixels)))
        torch.testing.assert_close(encoder(pixels), whole)
    exact = Sphinx(model_config("sphinx_sample", "vision.encoders.clip.quick_gelu=false"))
    assert exact.mixer is not None
    exact.load_state_dict(sample.state_dict())
    assert (exact.mixer.towers["clip"](pixels) - whole).abs().max() > 1e-4


@pytest.mark.parametrize("half", [False, True])
def test_dinov2_sees_imagenets_normalisation(half: bool) -> None:
    """Where images are resized in float16, they have CLIP's normalisation meanwhile, as in the original."""
    config = Dinov2Config(image_size=16, patch_size=8, width=8, layers=1, heads=1)
    encoder, pixels = Dinov2(config, ViewScheme(half_resize=half)), images(1, 32)
    image = normalise(pixels, CLIP_MEAN, CLIP_STD) if half else pixels / 255
    [view] = resize(image, 16, half=half)
    clip_mean, clip_std, mean, std = (
        torch.tensor(colour)[:, None, None] for colour in (CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD)
    )
    wanted = ((view * clip_std + clip_mean if half else view) - mean) / std
    torch.testing.assert_close(encoder.views(pixels)[0, 0], wanted, atol=1e-5, rtol=1e-5)


def test_positions_keep_their_class_row_and_constants() -> None:
    positions = torch.cat([torch.full((1, 1, 4), 7.0), torch.full((1, 37 * 37, 4), 2.0)], dim=1)
    out = resample_positions(positions, 16)
    assert out.shape == (1, 257, 4)
    assert torch.equal(out[:, 0], positions[:, 0])
    torch.testing.assert_close(out[:, 1:], torch.full((1, 256, 4), 2.0))
    assert resample_positions(out, 16) is out


def test_flops_of_each_encoder(sample: Sphinx) -> None:
    sample.requires_grad_(False)
    assert sample.mixer is not None
    for encoder in sample.mixer.encoders.values():
        # Plain matmuls: the counter of torch 2.11 does not know the CPU's fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoder(torch.randn(1, 3, 64, 64))
        assert encoder.flops() == pytest.approx(counter.get_total_flops(), rel=0.03), encoder.kind


def exchanged(view: Tensor) -> Tensor:
    """DINOv2's normalisation instead of CLIP's."""
    colours = zip(CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, strict=True)
    factors = [(a_std / b_std, (a - b) / b_std) for a, a_std, b, b_std in colours]
    scale, shift = (torch.tensor(values)[:, None, None] for values in zip(*factors, strict=True))
    return view * scale + shift


def half(pixels: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    return F.interpolate(pixels.half(), size=(size, size), mode=mode).float()


def quarters(pixels: Tensor) -> list[Tensor]:
    n = pixels.shape[-1] // 2
    return [pixels[..., :n, :n], pixels[..., :n, n:], pixels[..., n:, :n], pixels[..., n:, n:]]


# What each encoder's first layer gets in the original, as its code resizes and cuts: {kind: views of an image}.
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
def test_encoders_get_the_originals_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the released models, the encoders themselves small."""
    tiny = {"width": 8, "layers": 1, "heads": 1}
    config = model_config(name).vision
    assert config is not None
    small: dict[str, dict[str, Any]] = {
        "clip": tiny,
        "convnext": {"dims": [2, 2, 2, 8], "depths": [0, 0, 0, 0]},
        "dinov2": tiny,
        "qformer": tiny | {"vision_width": 8, "vision_layers": 1, "vision_heads": 1},
    }
    encoders = {kind: dataclasses.replace(encoder, **small[kind]) for kind, encoder in config.encoders.items()}
    mixer = MixedVisionEncoder(dataclasses.replace(config, encoders=encoders), 4)
    views: dict[str, Tensor] = {}
    for key, encoder in mixer.encoders.items():
        encode = encoder.encode
        monkeypatch.setattr(
            encoder, "encode", lambda pixels, key=key, encode=encode: encode(views.setdefault(key, pixels))
        )
    pixels = images(2, config.image_size)
    with torch.no_grad():
        assert mixer(pixels).shape[:2] == (2, config.tokens_per_image)
    for key, wanted in ORIGINAL_VIEWS[name](normalise(pixels, CLIP_MEAN, CLIP_STD)).items():
        of_images = torch.stack(wanted, dim=1).flatten(0, 1)
        assert torch.equal(views[key], exchanged(of_images) if key == "dinov2" else of_images), key
