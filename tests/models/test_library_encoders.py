"""Encoders of timm, open_clip and transformers compute what the library's own model does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sphinx_pl.checkpoints.encoders import load_pretrained
from sphinx_pl.models.config import SphinxConfig, VisionConfig
from sphinx_pl.models.encoders.base import CLIP_MEAN, IMAGENET_MEAN
from sphinx_pl.models.encoders.timm import Timm
from sphinx_pl.models.placement import OneDevice
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.models.vision import MixedVisionEncoder, align_map, build_encoder
from sphinx_pl.stages.build import build_model
from sphinx_pl.utils.errors import UserError
from tests.conftest import tiny_model

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
SIGLIP: dict[str, Any] = {"name": "vit_base_patch16_siglip_224", "image_size": 64, "args": SMALL}
SWIN = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [2, 2, 2, 2]}
TIMM: dict[str, dict[str, Any]] = {
    "vit": {"name": "test_vit", "image_size": 64},
    "registers": {"name": "vit_small_patch16_dinov3", "image_size": 64, "args": SMALL},
    "siglip": SIGLIP,
    "convnext": {"name": "test_convnext", "image_size": 64},
    "resnet": {"name": "test_resnet", "image_size": 64},
    "mobilenet": {"name": "mobilenetv4_conv_small_035", "image_size": 64},
    "lite": {"name": "tf_efficientnet_lite0", "image_size": 64},
    "swin": {"name": "swin_tiny_patch4_window7_224", "image_size": 56, "args": SWIN},
}  # fmt: skip
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "timm": {"image_size": 64, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
}
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": SIZES | {"image_size": 32},
    "siglip_vision_model": SIZES | {"image_size": 32},
    "siglip2_vision_model": SIZES | {"num_patches": 16},
    "dinov2": SIZES | {"image_size": 48},
    "dinov3_vit": SIZES | {"image_size": 32, "num_register_tokens": 4},
    "internvl_vision": SIZES | {"image_size": [32, 32], "patch_size": [8, 8]},
    "vit": SIZES | {"image_size": 32},
}


def shuffled(module: nn.Module) -> Any:
    """Every tensor gets values of its own; variances are positive."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator) * 0.1
            value.copy_(noise.abs() + 0.5 if "var" in name else noise + 1 if value.ndim == 1 else noise)
    return module.eval()


def encoder_of(section: dict[str, Any], **vision: Any) -> Any:
    """The encoder of a model with this one alone, without a kind of its own for a name."""
    config = VisionConfig({"own": section}, **({"image_size": 64} | vision))
    return build_encoder(config, "own").eval()


def pixels(encoder: Any) -> Tensor:
    size = encoder.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(encoder: Any, first: Tensor, patches: Tensor) -> None:
    """The encoder's tokens are a class token, or the patches' mean, and the library's patches."""
    with torch.no_grad():
        tokens = encoder(pixels(encoder))
    torch.testing.assert_close(tokens[:, 1:], patches, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tokens[:, :1], first, atol=1e-6, rtol=1e-6)
    assert tokens.shape[1:] == (encoder.config.tokens, encoder.config.width)
    assert encoder.config.grid**2 == patches.shape[1]


def counted(encoder: Any) -> None:
    """FLOPs and gradients are those of a pass on the CPU, and meta tensors have the same names."""
    views = pixels(encoder)[:1]
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            tokens = encoder.train()(views)
        tokens.mul(torch.randn_like(tokens)).sum().backward()
    assert encoder.flops() == counter.get_total_flops()
    assert [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.device("meta"):
        empty = type(encoder)(encoder.config)
    assert {name: value.shape for name, value in empty.state_dict().items()} == {
        name: value.shape for name, value in encoder.state_dict().items()
    }
    for name, table in empty.named_buffers():
        assert torch.equal(table, encoder.get_buffer(name)), name


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, tmp_path: Path) -> None:
    section = {"kind": "timm"} | TIMM[name]
    encoder = encoder_of(section)
    sizes = {"img_size": section["image_size"]} if name in ("vit", "registers", "siglip", "swin") else {}
    released = shuffled(timm.create_model(section["name"], **section.get("args", {}), **sizes))
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    load_pretrained(encoder, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        features = released.forward_features(pixels(encoder))
    if features.dim() == 3:
        count = released.num_prefix_tokens
        prefix, patches = features[:, :count], features[:, count:]
    else:
        nhwc = name == "swin"
        prefix, patches = features.new_zeros(0), features.flatten(1, 2) if nhwc else features.flatten(2).transpose(1, 2)
    same(encoder, prefix[:, :1] if prefix.numel() else patches.mean(1, keepdim=True), patches)
    counted(encoder)
    defaults = timm.data.resolve_model_data_config(released)
    assert (encoder.mean, encoder.std) == (defaults["mean"], defaults["std"])


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name: str, tmp_path: Path) -> None:
    from open_clip.model import CustomTextCLIP

    text = {"context_length": 7, "vocab_size": 11, "width": 16, "heads": 2, "layers": 1}
    released: Any = shuffled(CustomTextCLIP(embed_dim=8, vision_cfg=OPEN_CLIP[name], text_cfg=text))
    save_file(released.state_dict(), tmp_path / "open_clip_model.safetensors")
    encoder = encoder_of({"kind": "open_clip", "config": {"embed_dim": 8, "vision_cfg": OPEN_CLIP[name]}})
    load_pretrained(encoder, str(tmp_path / "open_clip_model.safetensors"))
    visual, views = released.visual, pixels(encoder)
    with torch.no_grad():
        if name == "timm":
            features = visual.trunk.forward_features(views)
            first, patches = features[:, :1], features[:, 1:]
        elif name == "resnet":
            patches = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(views))))).flatten(2).mT
            first = patches.mean(1, keepdim=True)
        else:
            tokens = visual.ln_post(visual.transformer(visual._embeds(views)))
            first, patches = tokens[:, :1], tokens[:, 1:]
    same(encoder, first, patches)
    counted(encoder)
    assert encoder.mean == CLIP_MEAN


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("load", ["folder", "part"])
def test_transformers(name: str, load: str, tmp_path: Path) -> None:
    """Weights lie in a folder, or behind a prefix in the file of a model that they are a part of."""
    from transformers import AutoConfig, AutoModel

    settings = AutoConfig.for_model(name, **TRANSFORMERS[name])
    released = shuffled(AutoModel.from_config(settings))
    released.save_pretrained(tmp_path)
    section: dict[str, Any] = {"kind": "transformers", "load": str(tmp_path), "image_size": 32}
    encoder = encoder_of(section)
    if load == "part":
        from safetensors.torch import load_file

        whole = {f"vision_tower.{key}": value for key, value in load_file(tmp_path / "model.safetensors").items()}
        save_file(whole | {"language_model.embed.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    load_pretrained(encoder, encoder.config.load)
    views = pixels(encoder)
    inputs: dict[str, Any] = {"pixel_values": views}
    if name == "siglip2_vision_model":
        patches = views.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 192)
        mask, shapes = torch.ones(2, 16, dtype=torch.int64), torch.tensor([[4, 4], [4, 4]])
        inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    with torch.no_grad():
        tokens = released(**inputs).last_hidden_state
    patches = tokens[:, -16:]
    same(encoder, patches.mean(1, keepdim=True) if "siglip" in name else tokens[:, :1], patches)
    if load == "folder":
        counted(encoder)
        # A checkpoint needs no folder.
        again = VisionConfig({"own": encoder.config.to_dict() | {"load": None}}, image_size=64)
        assert dataclasses.replace(encoder.config, load=None) == again.encoders["own"]


def test_layers_and_prefixes() -> None:
    model = {"kind": "timm"} | TIMM["registers"]
    ours = encoder_of(model | {"join": "sequence", "prefix": "all", "layer": -2})
    released: Any = timm.create_model("vit_small_patch16_dinov3", img_size=64, **model["args"]).eval()
    weights = {name.removeprefix("model."): value for name, value in ours.state_dict().items()}
    released.load_state_dict(weights, strict=False)
    views = pixels(ours)
    with torch.no_grad():
        options = {"return_prefix_tokens": True, "intermediates_only": True}
        [(image, prefix)] = released.forward_intermediates(views, indices=[0], **options)
        torch.testing.assert_close(ours(views), torch.cat([prefix, image.flatten(2).mT], 1), atol=1e-6, rtol=1e-6)
    assert len(list(ours.blocks())) == 0  # one block, of the two
    assert ours.config.tokens == 5 + 16
    assert encoder_of(model | {"join": "sequence", "prefix": "none"}).config.tokens == 16
    config = {"model_type": "clip_vision_model"} | TRANSFORMERS["clip_vision_model"]
    clip = encoder_of({"kind": "transformers", "config": config, "layer": -1, "norm": True})
    plain = encoder_of({"kind": "transformers", "config": config})
    plain.load_state_dict(clip.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(clip(views[..., :32, :32]), clip.model.post_layernorm(plain(views[..., :32, :32])))


def test_normalisation_is_the_librarys() -> None:
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    encoder = encoder_of({"kind": "timm"} | TIMM["registers"])
    assert encoder.mean == IMAGENET_MEAN
    transform = timm.data.create_transform((3, 64, 64), mean=encoder.mean, std=encoder.std, crop_pct=1.0)
    from torchvision.transforms.functional import to_pil_image

    torch.testing.assert_close(encoder.views(image)[0, 0], transform(to_pil_image(image[0])), atol=1e-6, rtol=1e-6)
    own = encoder_of({"kind": "timm", "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]} | TIMM["convnext"])
    white = own.views(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))[0, 0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([0.9, 0.4, 0.7 / 3]))


def mixed(**vision: Any) -> SphinxConfig:
    """Two timm encoders and one of each other library, which differ in grid."""
    values = tiny_model().to_dict()
    dinov3 = {"model_type": "dinov3_vit"} | TRANSFORMERS["dinov3_vit"]
    values["vision"] = {
        "image_size": 64,
        "align": "bilinear",
        "encoders": {
            "lite": {"kind": "timm"} | TIMM["lite"],
            "siglip": {"kind": "timm", "resampler": {"kind": "average", "tokens": 6}} | SIGLIP,
            "open_clip": {"config": {"embed_dim": 8, "vision_cfg": OPEN_CLIP["vit"]}},
            "dino": {"kind": "transformers", "config": dinov3, "image_size": 48},
        },
    } | vision  # fmt: skip
    return SphinxConfig.from_dict(values)


def test_grids_are_aligned() -> None:
    config = mixed().vision
    assert config is not None
    assert [encoder.part for encoder in config.channel_encoders] == ["dino", "lite", "open_clip"]
    assert [encoder.grid for encoder in config.channel_encoders] == [6, 2, 4]
    assert config.patch_grid == 6
    assert config.view_tokens == [2 + 6 + 37]
    assert mixed(align_grid=4).vision.patch_grid == 4  # type: ignore[union-attr]
    assert mixed(align_grid="first").vision.patch_grid == 6  # type: ignore[union-attr]
    mixer = MixedVisionEncoder(config, 16).eval()
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        out = mixer(image)
        joined = []
        for part in ("dino", "lite", "open_clip"):
            tokens = mixer.encode(mixer.encoders[part], image)
            grid = mixer.encoders[part].config.grid
            feature_map = tokens[:, 1:].mT.unflatten(2, (grid, grid))
            resized = nn.functional.interpolate(feature_map, size=(6, 6), mode="bilinear", align_corners=False)
            joined.append(torch.cat([tokens[:, :1], resized.flatten(2).mT], 1))
        torch.testing.assert_close(out[:, 7:-1], mixer.visual_proj(torch.cat(joined, -1)))  # type: ignore[misc]
        siglip = mixer.encode(mixer.encoders["siglip"], image).unflatten(1, (4, 4))
        rows = torch.stack([siglip[:, :2].mean(1), siglip[:, 2:].mean(1)], 1)  # [2, rows, columns, C]
        pooled = torch.stack([rows[:, :, a:b].mean(2) for a, b in ((0, 2), (1, 3), (2, 4))], 2).flatten(1, 2)
        torch.testing.assert_close(out[:, 1:7], mixer.siglip_proj(pooled))  # type: ignore[operator]


def test_a_pixel_shuffle_and_its_inverse() -> None:
    tokens = torch.randn(2, 1 + 36, 5)
    coarse = align_map(tokens, 3, "shuffle")
    assert coarse.shape == (2, 10, 20)
    torch.testing.assert_close(align_map(coarse, 6, "shuffle"), tokens)
    assert align_map(tokens, 6, "shuffle") is tokens
    one = {"lite": {"kind": "timm"} | TIMM["lite"], "vit": {"kind": "timm"} | SIGLIP}  # grids of 2 and 4
    config = VisionConfig(one, image_size=64, align="shuffle")
    assert [config.channel_width(encoder) for encoder in config.channel_encoders] == [1280 // 4, 24]
    out = MixedVisionEncoder(config, 16)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert out.shape == (1, config.tokens_per_image, 16)


def own(key: str = "own", **section: Any) -> dict[str, Any]:
    return {"encoders": {key: section}}


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"align": None}, r"dino has a 6x6 grid but lite 2x2: .*align=bilinear"),
        ({"align": "shuffle"}, r"encoders\.lite: a pixel shuffle cannot bring its 2x2 grid of 1280 channels to 6x6"),
        ({"align": "nearest"}, r"model\.vision\.align='nearest'.*bilinear"),
        ({"align_grid": "smallest"}, r"model\.vision\.align_grid=smallest must be largest, first or a number"),
        ({"projection": "mpl"}, r"model\.vision\.projection='mpl'.*mlp"),
        (own(name="test_vit", key="mine"), r"encoders\.mine.*needs .*mine\.kind=.*timm"),
        (own(kind="timm", key="clip"), r"clip\.kind=timm: 'clip' is a kind itself"),
        (own(kind="timm", name="test_vit", key="visual"), r"encoders\.visual: .*cannot have this key"),
        (own(kind="timm", name="test_vitt"), r"own\.name=test_vitt: timm has no such model.*test_vit"),
        (own(kind="timm", name="test_vit", layer=99), r"encoders\.own\.layer=99: test_vit has no"),
        (own(kind="timm", name="test_vit", prefix="all"), r"own\.prefix=all needs .*join=sequence"),
        (own(kind="timm", name="test_vit", norm=True), r"own\.norm=true needs a layer"),
        (own(kind="timm", name="test_vit", args={"foo": 1}), r"encoders\.own: timm cannot build test_vit"),
        (own(kind="timm", name="test_vit", imagesize=1), r"own\.imagesize: did you mean .*image_size"),
        (own(kind="timm", name="test_vit", join="chanel"), r"own\.join='chanel'.*channel"),
        (own(kind="transformers", config={"model_type": "clop"}), r"encoders\.own\.config is no config"),
        (own(kind="open_clip", name="ViT-B-33"), r"own\.name=ViT-B-33: neither one of open_clip's.*ViT-B-32"),
        (
            own(kind="timm", name="test_vit", join="channel", resampler={"kind": "average"}),
            r"own\.join=channel: the tokens of a resampler",
        ),
        (
            own(kind="timm", **SIGLIP, resampler={"kind": "average", "tokens": 7}),
            r"own\.resampler\.tokens=7 needs a map of 1x7 patches but the encoder has 4x4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        mixed(**vision)
    assert "\n" not in str(error.value)


def test_a_model_of_them_is_born_a_tensor_at_a_time() -> None:
    config = mixed()
    torch.manual_seed(0)
    model = build_model(config, ["lite"], OneDevice(), None).train()
    assert [*model.parts()] == ["decoder", "projections", "dino", "lite", "open_clip", "siglip"]
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    names = [name for name, _ in model.named_parameters()]
    assert set(names) == set(model.state_dict())
    assert "mixer.towers.lite.model.bn1.running_var" in names
    assert model.get_parameter("mixer.towers.siglip.model.pos_embed").requires_grad
    vision = model.vision
    assert vision is not None
    lite = vision.encoders["lite"]
    norms = [module for module in lite.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_statistics_stay_while_an_encoder_trains() -> None:
    encoder = encoder_of({"kind": "timm"} | TIMM["resnet"]).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items() if "running" in name}
    assert before
    encoder(pixels(encoder)).sum().backward()
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())
    assert not any(encoder.get_parameter(name).requires_grad for name in before)


@pytest.mark.parametrize("kind", ["average", "qformer"])
def test_a_resampler_behind_any_encoder(kind: str) -> None:
    queries = {"queries": 3, "width": 16, "layers": 2, "heads": 2, "ffn_width": 24}
    sizes = queries if kind == "qformer" else {"tokens": 4}
    values = tiny_model().to_dict()
    values["vision"]["encoders"]["clip"]["resampler"] = {"kind": kind} | sizes
    config = SphinxConfig.from_dict(values)
    assert SphinxConfig.from_dict(config.to_dict()) == config
    vision = config.vision
    assert vision is not None
    assert [encoder.part for encoder in vision.sequence_encoders] == ["clip", "qformer"]
    torch.manual_seed(0)
    model = build_model(config, ["clip"], OneDevice(), None)
    mixer = model.vision
    assert mixer is not None
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    out = mixer(image)
    assert out.shape[1] == vision.tokens_per_image == 2 + (3 if kind == "qformer" else 4) + 2 + 5
    resampler = mixer.resamplers["clip"]
    tokens = mixer.encode(mixer.encoders["clip"], image)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        resampler(tokens)
    assert tokens.shape[1] == 17
    assert resampler.flops(17) == counter.get_total_flops()  # type: ignore[operator]
    out.mul(torch.randn_like(out)).sum().backward()
    missing = [name for name, p in mixer.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.requires_grad for p in mixer.resamplers.parameters())


def test_the_projection_of_llava() -> None:
    values = tiny_model().to_dict()
    values["vision"]["projection"] = "mlp"
    model = Sphinx(SphinxConfig.from_dict(values))
    vision = model.vision
    assert vision is not None
    assert vision.visual_proj is not None
    assert [type(module).__name__ for module in vision.visual_proj] == ["Linear", "GELU", "Linear"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vision(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert vision.flops() == pytest.approx(counter.get_total_flops(), rel=0.03)
    torch.manual_seed(0)
    built = build_model(model.config, [], OneDevice(), None)
    assert set(built.state_dict()) == set(model.state_dict())


def test_efficientnet_lite_by_the_names_of_its_ports(tmp_path: Path) -> None:
    released: Any = shuffled(timm.create_model("tf_efficientnet_lite0"))
    ported, number = {}, 0
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    for name, module in released.named_children():
        if name in top:
            ported |= {f"{top[name]}.{key}": value for key, value in module.state_dict().items()}
    for stage in released.blocks:
        for block in stage:
            order = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            order = ["_expand_conv", "_bn0", *order] if hasattr(block, "conv_pwl") else order
            layers = [child for child in block.children() if any(True for _ in child.parameters())]
            for theirs, layer in zip(order, layers, strict=True):
                ported |= {f"_blocks.{number}.{theirs}.{key}": value for key, value in layer.state_dict().items()}
            number += 1
    torch.save(ported, tmp_path / "lite.pth", _use_new_zipfile_serialization=False)
    encoder = encoder_of({"kind": "timm", "load": str(tmp_path / "lite.pth")} | TIMM["lite"])
    assert isinstance(encoder, Timm)
    load_pretrained(encoder, str(tmp_path / "lite.pth"))
    with torch.no_grad():
        features = released.forward_features(pixels(encoder)).flatten(2).mT
        torch.testing.assert_close(encoder(pixels(encoder))[:, 1:], features)


def test_positions_of_another_grid_are_resampled_as_the_library_does(tmp_path: Path) -> None:
    released = shuffled(timm.create_model("test_vit", img_size=96))
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    encoder = encoder_of({"kind": "timm"} | TIMM["vit"])
    load_pretrained(encoder, str(tmp_path / "model.safetensors"))
    released.set_input_size(64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels(encoder)), released.forward_features(pixels(encoder)))
