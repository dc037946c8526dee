"""Released weights of the encoders: the libraries' own models, saved in their layouts, compute the same in ours."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sphinx_pl.checkpoints.encoders import find_files, load_pretrained, match, recognise
from sphinx_pl.models.encoders.base import Encoder, ViewScheme
from sphinx_pl.models.encoders.clip import ClipViT, ClipViTConfig
from sphinx_pl.models.encoders.convnext import ConvNext, ConvNextConfig, map_to_tokens
from sphinx_pl.models.encoders.dinov2 import Dinov2, Dinov2Config, resample_positions
from sphinx_pl.models.encoders.qformer import QFormer, QFormerConfig
from sphinx_pl.utils.errors import UserError
from tests.checkpoints.conftest import cached
from tests.conftest import REPOSITORY
from tests.fuzzing import damaged

State = dict[str, Tensor]
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 3}
CONVNEXT: dict[str, Any] = {"image_size": 64, "depths": [1, 1, 2, 1], "dims": [8, 12, 16, 20]}
QFORMER: dict[str, Any] = {"image_size": 32, "patch_size": 8, "vision_width": 24, "vision_layers": 2, "vision_heads": 3}
QFORMER |= {"vision_ffn_width": 40, "queries": 3, "width": 16, "layers": 3, "heads": 2, "ffn_width": 28}


def clip(**changes: Any) -> ClipViT:
    return ClipViT(ClipViTConfig(**(VIT | changes))).eval()


def convnext(**changes: Any) -> ConvNext:
    return ConvNext(ConvNextConfig(**(CONVNEXT | changes)), ViewScheme(patch_grid=4)).eval()


def dinov2(**changes: Any) -> Dinov2:
    return Dinov2(Dinov2Config(**(VIT | changes))).eval()


def qformer() -> QFormer:
    return QFormer(QFormerConfig(**QFORMER)).eval()


def shuffled(module: nn.Module) -> Any:
    """Every tensor gets values of its own: zeros, ones and equal layers would hide a wrong name."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1.0 if parameter.ndim == 1 and name.endswith("weight") else noise)
    return module.eval()


def open_clip_model(vision: dict[str, Any]) -> Any:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    text = CLIPTextCfg(context_length=7, vocab_size=11, width=16, heads=2, layers=2)
    return CLIP(embed_dim=8, vision_cfg=CLIPVisionCfg(**vision), text_cfg=text, quick_gelu=True)


def open_clip_vit() -> Any:
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8}
    return shuffled(open_clip_model(vision))


def timm_convnext(classes: int) -> Any:
    import timm

    sizes = {"depths": CONVNEXT["depths"], "dims": CONVNEXT["dims"], "num_classes": classes}
    return shuffled(timm.create_model("convnext_xxlarge", **sizes))


def open_clip_convnext() -> Any:
    model = open_clip_model({"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"})
    trunk = timm_convnext(0)
    model.visual.trunk = trunk
    return shuffled(model)


def timm_dinov2(image_size: int = 32) -> Any:
    import timm

    sizes = {"img_size": image_size, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return shuffled(timm.create_model("vit_giant_patch14_dinov2", **sizes))


def blip2() -> Any:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    text = OPTConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8)
    text.word_embed_proj_dim = 8
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    q = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 28}
    config = Blip2Config(
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        qformer_config=q | {"encoder_hidden_size": 24, "vocab_size": 13, "hidden_dropout_prob": 0.0},
        text_config=text.to_dict(),
        num_query_tokens=3,
    )
    return shuffled(Blip2ForConditionalGeneration(config))


def blip2_tokens(model: Any, pixels: Tensor) -> Tensor:
    seen = model.vision_model(pixel_values=pixels).last_hidden_state
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    return torch.as_tensor(model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state)


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(encoder: Encoder, source: Path, expected: Tensor, pixels: Tensor) -> None:
    """`source` gives `expected`, in an encoder that has weights and in one on the meta device."""
    load_pretrained(encoder, str(source))
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)
    wanted = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.to("meta")
    load_pretrained(encoder, str(source))
    assert all(torch.equal(value, wanted[name]) for name, value in encoder.state_dict().items())


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


# -- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin", "training checkpoint"])
def test_open_clips_vit(tmp_path: Path, kind: str) -> None:
    model = open_clip_vit()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    path = tmp_path / ("clip.safetensors" if kind == "safetensors" else "clip.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "bin":
        torch.save(state, path)
    else:
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, path)
    pixels = images()
    expected = model.visual.ln_post(model.visual.transformer(model.visual._embeds(pixels)))
    same(clip(), path, expected, pixels)


def test_transformers_clip(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=sizes | {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"},
        text_config=text | {"vocab_size": 11},
        projection_dim=6,
    )
    model = shuffled(CLIPModel(config))
    model.save_pretrained(tmp_path / "hf")
    pixels = images()
    vision = model.vision_model
    same(clip(), tmp_path / "hf", vision.post_layernorm(vision(pixel_values=pixels).last_hidden_state), pixels)


def test_timms_clip(tmp_path: Path) -> None:
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = shuffled(timm.create_model("vit_base_patch16_clip_quickgelu_224", **sizes))
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    pixels = images()
    same(clip(), tmp_path / "clip.safetensors", model.forward_features(pixels), pixels)


@pytest.mark.parametrize(("file", "config"), [
    ("open_clip_config.json", {"model_cfg": {"embed_dim": 8}}),
    ("config.json", {"vision_config": {"hidden_act": "gelu"}}),
])  # fmt: skip
def test_weights_of_another_gelu_are_refused(tmp_path: Path, file: str, config: dict[str, Any]) -> None:
    torch.save(open_clip_vit().state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / file).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"set model\.vision\.encoders\.clip\.quick_gelu=false"):
        load_pretrained(clip(), str(tmp_path))
    load_pretrained(clip(quick_gelu=False), str(tmp_path))
    with pytest.raises(UserError, match=r"set model\.vision\.encoders\.clip\.quick_gelu=false"):
        load_pretrained(clip(), "laion400m_e32")


@pytest.mark.parametrize("key", ["clip", "convnext", "dinov2", "qformer"])
def test_our_own_names(tmp_path: Path, key: str) -> None:
    encoder = shuffled(ENCODERS[key]())
    save_file(encoder.state_dict(), tmp_path / "own.safetensors")
    pixels = images(64 if key == "convnext" else 32)
    same(ENCODERS[key](), tmp_path / "own.safetensors", encoder(pixels), pixels)


# -- ConvNeXt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["timm", "open_clip"])
def test_convnext(tmp_path: Path, layout: str) -> None:
    model = timm_convnext(7) if layout == "timm" else open_clip_convnext()
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    trunk = model if layout == "timm" else model.visual.trunk
    pixels = images(64)
    expected = map_to_tokens(trunk.head.norm(trunk.forward_features(pixels)), 2)
    same(convnext(), tmp_path / "x.safetensors", expected, pixels)


# -- DINOv2 ----------------------------------------------------------------------------------------------------------


def as_meta_names(state: State) -> State:
    """What Meta's own code calls the same tensors; it has one for masked patches, too."""
    renamed = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for n, value in state.items()}
    return {**renamed, "mask_token": torch.zeros(1, 24)}


@pytest.mark.parametrize("layout", ["timm", "Meta"])
def test_dinov2(tmp_path: Path, layout: str) -> None:
    model = timm_dinov2()
    state = model.state_dict()
    torch.save(as_meta_names(state) if layout == "Meta" else state, tmp_path / "dinov2.pth")
    pixels = images()
    same(dinov2(), tmp_path / "dinov2.pth", model.forward_features(pixels), pixels)


def test_transformers_dinov2(tmp_path: Path) -> None:
    from transformers import Dinov2Config as Config
    from transformers import Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    model = shuffled(Dinov2Model(Config(use_swiglu_ffn=True, **sizes)))
    model.save_pretrained(tmp_path / "hf")
    pixels = images()
    same(dinov2(), tmp_path / "hf", model(pixel_values=pixels).last_hidden_state, pixels)


def test_dinov2s_positions_follow_the_configuration(tmp_path: Path) -> None:
    state = timm_dinov2(40).state_dict()
    torch.save(as_meta_names(state), tmp_path / "dinov2.pth")
    resampled, kept = dinov2(), dinov2(position_grid=5)
    for encoder in (resampled, kept):
        load_pretrained(encoder, str(tmp_path / "dinov2.pth"))
    assert torch.equal(kept.model.pos_embed, state["pos_embed"])
    assert torch.equal(resampled.model.pos_embed, resample_positions(state["pos_embed"], 4))
    torch.testing.assert_close(kept(images()), resampled(images()))
    with pytest.raises(UserError, match=r"'pos_embed' is \[1, 26, 24\] instead of \[1, 37, 24\]"):
        load_pretrained(dinov2(position_grid=6), str(tmp_path / "dinov2.pth"))


# -- BLIP-2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_transformers_blip2_in_shards(tmp_path: Path, kind: str) -> None:
    model, pixels = blip2(), images()
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    if kind == "bin":
        for shard in set(weight_map.values()):
            file = tmp_path / "hf" / shard
            torch.save(load_file(file), file.with_suffix(".bin"))
            file.unlink()
        index.unlink()
        weight_map = {name: shard.replace(".safetensors", ".bin") for name, shard in weight_map.items()}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    of_language = {s for n, s in weight_map.items() if n.startswith("language")}
    for shard in of_language - {s for n, s in weight_map.items() if not n.startswith("language")}:
        (tmp_path / "hf" / shard).unlink()  # not needed
    same(qformer(), tmp_path / "hf", blip2_tokens(model, pixels), pixels)


def as_lavis_names(state: State, vit: str) -> State:
    """By the table of transformers' own conversion of the original's weights, backwards."""
    out: State = {}
    for name, value in state.items():
        if name.startswith("language"):
            continue
        for ours, theirs in (
            ("vision_model.embeddings.class_embedding", f"{vit}cls_token"),
            ("vision_model.embeddings.position_embedding", f"{vit}pos_embed"),
            ("vision_model.embeddings.patch_embedding", f"{vit}patch_embed.proj"),
            ("vision_model.post_layernorm", "ln_vision"),
            ("vision_model.encoder.layers", f"{vit}blocks"),
            ("layer_norm", "norm"),
            ("self_attn.projection", "attn.proj"),
            ("self_attn.qkv", "attn.qkv"),
            ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
            ("qformer.", "Qformer.bert."),
            ("attention.attention", "attention.self"),
        ):
            name = name.replace(ours, theirs)
        if name.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            out[name.replace("qkv.bias", "q_bias")], out[name.replace("qkv.bias", "v_bias")] = q.clone(), v.clone()
        else:
            out[name] = value
    out["Qformer.bert.embeddings.position_ids"] = torch.arange(5)[None]
    out["Qformer.bert.embeddings.word_embeddings.weight"] = torch.zeros(11, 16)
    out["Qformer.bert.encoder.layer.0.intermediate.dense.weight"] = torch.zeros(28, 16)
    out["Qformer.cls.predictions.bias"] = torch.zeros(11)
    return out | {"temp": torch.ones(()), "vision_proj.weight": torch.zeros(4, 16), "opt_proj.bias": torch.zeros(4)}


@pytest.mark.parametrize("files", ["one", "ViT by itself"])
def test_lavis_blip2(tmp_path: Path, files: str) -> None:
    model, pixels = blip2(), images()
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.qkv.bias[24:48] = 0.0  # of keys, which the original does not have
    state = as_lavis_names(model.state_dict(), "visual_encoder." if files == "one" else "")
    path = tmp_path / "lavis"
    path.mkdir()
    if files == "one":
        path = path / "blip2.pth"
        torch.save({"model": state, "epoch": 1}, path)
    else:
        vit = {name: value for name, value in state.items() if name.startswith(("blocks", "cls", "pos", "patch"))}
        torch.save(vit, path / "eva_vit_g.pth")
        torch.save({"model": {n: v for n, v in state.items() if n not in vit}}, path / "blip2_pretrained.pth")
    same(qformer(), path, blip2_tokens(model, pixels), pixels)


# -- full size -------------------------------------------------------------------------------------------------------


def full_size() -> dict[str, tuple[str, Callable[[], nn.Module]]]:
    """Published models on the meta device: the encoder that each is for, and how to build it."""
    import open_clip
    import timm
    from transformers import Blip2Config, Blip2ForConditionalGeneration, CLIPConfig, CLIPModel

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    large = CLIPConfig(vision_config=sizes | {"patch_size": 14})
    return {
        "open_clip ViT": ("clip", lambda: open_clip.create_model("ViT-L-14", device="meta")),
        "transformers ViT": ("clip", lambda: CLIPModel(large)),
        "timm ViT": ("clip", lambda: timm.create_model("vit_large_patch14_clip_224")),
        "open_clip ConvNeXt": ("convnext", lambda: open_clip.create_model("convnext_xxlarge", device="meta")),
        "timm ConvNeXt": ("convnext", lambda: timm.create_model("convnext_xxlarge", num_classes=1024)),
        "timm DINOv2": ("dinov2", lambda: timm.create_model("vit_giant_patch14_dinov2")),
        "transformers BLIP-2": ("qformer", lambda: Blip2ForConditionalGeneration(Blip2Config())),
    }


@pytest.mark.parametrize("name", ["open_clip ViT", "transformers ViT", "timm ViT", "open_clip ConvNeXt",
                                  "timm ConvNeXt", "timm DINOv2", "transformers BLIP-2"])  # fmt: skip
def test_every_key_of_a_published_model_has_its_place(name: str) -> None:
    key, build = full_size()[name]
    with torch.device("meta"):
        model = build()
        encoders: dict[str, Callable[[], Encoder]] = {
            "clip": lambda: ClipViT(ClipViTConfig()),
            "convnext": lambda: ConvNext(ConvNextConfig(), ViewScheme(patch_grid=16)),
            "dinov2": lambda: Dinov2(Dinov2Config()),
            "qformer": lambda: QFormer(QFormerConfig()),
        }
        encoder = encoders[key]()
    shapes = {n: tuple(value.shape) for n, value in model.state_dict().items()}
    sources = match(encoder, shapes)
    used = [theirs for source in sources.values() for theirs in source.names]
    layout = recognise(encoder, shapes)
    assert layout.name in name
    assert len(used) == len(set(used))
    assert all(layout.leaves_out(n) for n in shapes if n not in set(used))
    if key == "dinov2":
        with torch.device("meta"):
            shipped = Dinov2(Dinov2Config(position_grid=37))
        match(shipped, shapes)


# -- names of models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "repo"), [
    ("openai", "timm/vit_large_patch14_clip_224.openai"),
    ("ViT-L-14/openai", "timm/vit_large_patch14_clip_224.openai"),
    ("hf-hub:some/clip", "some/clip"),
    ("some/clip", "some/clip"),
])  # fmt: skip
def test_names_lead_to_the_cache(cache: Path, source: str, repo: str) -> None:
    file = cached(cache, repo, "open_clip_model.safetensors")
    save_file(open_clip_vit().state_dict(), file)
    encoder = clip()
    load_pretrained(encoder, source)
    assert torch.equal(encoder.model.conv1.weight, load_file(file)["visual.conv1.weight"])
    cached(cache, repo, "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": false}}')
    with pytest.raises(UserError, match="trained with quick_gelu=false"):
        load_pretrained(encoder, source)


def test_timms_and_blip2s_names_lead_to_the_cache(cache: Path) -> None:
    file = cached(cache, "timm/convnext_xxlarge.clip_laion2b_soup", "model.safetensors")
    save_file(timm_convnext(7).state_dict(), file)
    load_pretrained(convnext(), "convnext_xxlarge.clip_laion2b_soup")
    file = cached(cache, "timm/vit_giant_patch14_dinov2.lvd142m", "pytorch_model.bin")
    torch.save(timm_dinov2().state_dict(), file)
    load_pretrained(dinov2(), "vit_giant_patch14_dinov2.lvd142m")
    state = {n: value for n, value in blip2().state_dict().items() if not n.startswith("language")}
    index = cached(cache, "Salesforce/blip2-opt-2.7b", "model.safetensors.index.json")
    weight_map = dict.fromkeys(state, "a.safetensors") | {"language_projection.bias": "b.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"looked for a\.safetensors of Salesforce/blip2-opt-2\.7b"):
        load_pretrained(qformer(), "Salesforce/blip2-opt-2.7b")
    save_file(state, index.with_name("a.safetensors"))
    load_pretrained(qformer(), "Salesforce/blip2-opt-2.7b")


def test_offline_the_message_says_what_to_put_where(cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained(dinov2(), "vit_giant_patch14_dinov2.lvd142m")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.vision.encoders.dinov2.load=vit_giant_patch14_dinov2.lvd142m: looked for ")
    assert "of timm/vit_giant_patch14_dinov2.lvd142m: neither in the cache" in message
    assert str(cache / "models--timm--vit_giant_patch14_dinov2.lvd142m") in message
    assert "HF_HUB_OFFLINE" in message


def test_a_name_that_is_none(cache: Path) -> None:
    with pytest.raises(UserError, match=r"neither a file nor a model's name, did you mean 'openai'"):
        load_pretrained(clip(), "openaii")
    with pytest.raises(UserError, match=r"model\.vision\.encoders\.dinov2\.load=no_such_model: neither a file nor"):
        load_pretrained(dinov2(), "no_such_model")
    with pytest.raises(UserError, match=r"did you mean 'laion400m_e32'"):
        load_pretrained(clip(), "ViT-L-14/laion400m_e33")
    with pytest.raises(UserError, match=r"did you mean 'vit_giant_patch14_dinov2\.lvd142m'"):
        load_pretrained(dinov2(), "vit_giant_patch14_dinov2.lvd14m")
    with pytest.raises(UserError, match="no such file"):
        load_pretrained(clip(), "weights/clip.pt")
    with pytest.raises(UserError, match="no name on the Hugging Face hub"):
        load_pretrained(clip(), "hf-hub:a/b/c")


def test_a_folder_goes_before_a_repository_of_its_name(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("some/clip", "openai"):
        Path(name).mkdir(parents=True)
        torch.save(open_clip_vit().state_dict(), Path(name, "any.pt"))
    assert find_files(clip(), "some/clip") == [Path("some/clip/any.pt")]
    with pytest.raises(UserError, match=r"timm/vit_large_patch14_clip_224\.openai"):
        find_files(clip(), "openai")


# -- mistakes --------------------------------------------------------------------------------------------------------


def refused(encoder: Encoder, path: Path, match: str) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError, match=match) as caught:
        load_pretrained(encoder, str(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{encoder.config.section}.load={path}: ")
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_missing_extra_and_misshapen_keys_are_named(tmp_path: Path) -> None:
    path, state = tmp_path / "clip.pt", open_clip_vit().state_dict()

    def changed(**changes: Any) -> Path:
        torch.save({n: v for n, v in (state | changes).items() if v is not None}, path)
        return path

    bias, block = "visual.ln_pre.bias", "visual.transformer.resblocks.1.mlp.c_fc.weight"
    near = r"1 missing: 'visual\.ln_pre\.bias' \(it has 'visual\.ln_pre\.bais'\)"
    refused(clip(), changed(**{bias: None, "visual.ln_pre.bais": state[bias]}), near)
    extra = r"1 unexpected: 'transformer\.resblocks\.0\.adapter'"
    refused(clip(), changed(**{"transformer.resblocks.0.adapter": torch.zeros(1)}), extra)
    shape = r"'visual\.transformer\.resblocks\.1\.mlp\.c_fc\.weight' is \[95, 24\] instead of \[96, 24\]"
    refused(clip(), changed(**{block: state[block][1:].clone()}), shape)
    refused(clip(layers=3), changed(), r"open_clip's layout.*'visual\.transformer\.resblocks\.2\.ln_1\.weight'")
    refused(clip(layers=1), changed(), r"unexpected: 'visual\.transformer\.resblocks\.1\.ln_1\.weight'")


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(as_meta_names(timm_dinov2().state_dict()), path)
    refused(clip(), path, r"timm's layout.*missing: 'norm_pre\.weight'")
    refused(convnext(), path, r"no key of these weights is this encoder's: one is 'blocks\.0\.attn\.proj\.bias'")
    save_file(blip2().vision_model.state_dict(), tmp_path / "vision.safetensors")
    refused(dinov2(), tmp_path / "vision.safetensors", "no key of these weights")
    torch.save({}, path)
    refused(dinov2(), path, "no key of these weights")
    torch.save([torch.zeros(1)], path)
    refused(dinov2(), path, "does not hold tensors by name")


def test_two_files_with_the_same_key(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(open_clip_vit().state_dict(), tmp_path / name)
    refused(clip(), tmp_path, r"b\.pt' holds .ln_final\.bias., as another file does")
    (tmp_path / "empty").mkdir()
    refused(clip(), tmp_path / "empty", "no weights in this folder")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {"visual.x": 3}}', '{"weight_map": {"visual.x": "../x.bin"}}'])
def test_a_damaged_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    refused(clip(), tmp_path, "has no weight_map")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['HOSTILE']}",)


ENCODERS: dict[str, Callable[[], Encoder]] = {"clip": clip, "convnext": convnext, "dinov2": dinov2, "qformer": qformer}


@pytest.mark.parametrize("key", ENCODERS)
def test_a_hostile_pickle_is_refused_and_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOSTILE", str(tmp_path / "executed"))
    encoder, path = ENCODERS[key](), tmp_path / "weights.pth"
    for layout in encoder.published:
        state = {
            theirs: torch.zeros(1) for name in encoder.state_dict() for theirs in layout.source(name, encoder).names
        }
        for content in (state | {"extra": Hostile()}, {"model": state, "optimizer": Hostile()}, Hostile()):
            torch.save(content, path)
            refused(encoder, path, "something else than tensors")
    torch.save(Hostile(), path, _use_new_zipfile_serialization=False)
    refused(encoder, path, "something else than tensors")
    os.truncate(path, 2**28 + 1)
    refused(encoder, path, "before 1.6")
    path.write_bytes(pickle.dumps(Hostile()))
    refused(encoder, path, "damaged")
    path.rename(tmp_path / "weights.safetensors")
    refused(encoder, tmp_path / "weights.safetensors", "damaged")
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "ViT-L-14.pt")
    refused(clip(), tmp_path / "ViT-L-14.pt", "is a TorchScript program")


def test_damaged_files_load_or_are_refused(tmp_path: Path) -> None:
    """Damage in the pickle of an archive that is whole, which no checksum catches, and in the archive's head."""
    path, counted = tmp_path / "clip.pt", {"read": 0, "refused": 0}
    torch.save(open_clip_vit().state_dict(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    encoder = clip()
    for seed in range(60):
        rng = random.Random(seed)
        if seed % 3:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in parts.items():
                    archive.writestr(name, damaged(content, rng) if name.endswith("data.pkl") else content)
        else:
            path.write_bytes(damaged(whole[:4096], rng) + whole[4096:])
        try:
            load_pretrained(encoder, str(path))
            counted["read"] += 1
        except UserError:
            counted["refused"] += 1
    assert counted["refused"] > 30


MEASURE = """
import re, sys, torch
from sphinx_pl.checkpoints import tensors
from sphinx_pl.checkpoints.encoders import load_pretrained
from sphinx_pl.models.encoders.dinov2 import Dinov2, Dinov2Config
tensors.MAPPED_BYTES = 2**25
with torch.device("meta"):
    encoder = Dinov2(Dinov2Config(image_size=28, width=1024, layers=6, heads=8, mlp_ratio=6.0))
def peak():  # not ru_maxrss, which begins with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
load_pretrained(encoder, sys.argv[1])
print(peak() - before - sum(value.nbytes for value in encoder.state_dict().values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_memory_beyond_the_encoders_is_that_of_one_mapping(tmp_path: Path, kind: str) -> None:
    """An encoder of 314 MiB, in a file with 128 MiB of something else; mappings are renewed every 32 MiB, not 512."""
    with torch.device("meta"):
        encoder = Dinov2(Dinov2Config(image_size=28, width=1024, layers=6, heads=8, mlp_ratio=6.0))
    state = {n.removeprefix("model."): torch.zeros(value.shape) for n, value in encoder.state_dict().items()}
    state["mask_token"] = torch.zeros(2**25)
    path = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    command = [sys.executable, "-c", MEASURE, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert int(out.stdout) < 100 * 2**20
