from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from sphinx_pl.checkpoints.families import FAMILIES
from sphinx_pl.checkpoints.format import with_common_names
from sphinx_pl.checkpoints.huggingface import open_model
from sphinx_pl.checkpoints.original import shipped_model
from sphinx_pl.mixing.plan import check_weights
from sphinx_pl.mixing.rules import PARTS, complement, layer_of, part_of, resolve, rules_table
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.mixing.conftest import huggingface_folder, original_folder

LAYERS = {f"decoder.layers.{layer}.attention.wq.weight": layer for layer in range(6)}
NAMES = [
    "decoder.tok_embeddings.weight",
    *LAYERS,
    "decoder.layers.0.ffn_norm.weight",
    "decoder.norm.weight",
    "mixer.towers.clip.model.conv1.weight",
    "mixer.visual_proj.0.weight",
]


def check(weights: Sequence[float]) -> list[float]:
    return check_weights(weights, 2)


def betas(
    *rules: Mapping[str, Any], otherwise: Sequence[float] | None = (0.5, 0.5), names: Sequence[str] = NAMES
) -> dict[str, float]:
    """The first weight of each tensor."""
    chosen, _ = resolve(rules, otherwise, {name: name for name in names}, check)
    assert all(sum(weights) == pytest.approx(1) for weights in chosen.values())
    return {name: weights[0] for name, weights in chosen.items()}


def fitting(part: str, names: Mapping[str, str]) -> set[str]:
    return {key for key, name in names.items() if PARTS[part](name)}


@pytest.fixture(scope="module")
def sample() -> Sphinx:
    with torch.device("meta"):
        return Sphinx(SphinxConfig.from_dict(shipped_model("sphinx_sample")))


def test_every_tensor_of_the_sample_model_has_a_part(sample: Sphinx) -> None:
    parts = {name: part_of(name) for name in sample.state_dict()}
    found = set(parts.values())
    assert found == {"clip", "convnext", "dinov2", "qformer", "projections", "embeddings", "decoder"}
    for name, part in parts.items():
        prefix = {"decoder": "decoder.", "embeddings": "decoder.", "projections": "mixer."}
        assert name.startswith(prefix.get(part, f"mixer.towers.{part}.")), name
        covers = "encoders" if part in ("clip", "convnext", "dinov2", "qformer") else part
        assert PARTS[covers](name), name


def test_norms_attention_and_feed_forward_of_the_sample_models_decoder(sample: Sphinx) -> None:
    kinds: dict[str, set[str]] = {"norms": set(), "attention": set(), "feed_forward": set()}
    for path, module in sample.decoder.named_modules(prefix="decoder"):
        own = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if "norm" in type(module).__name__.lower():
            kinds["norms"] |= own
        elif isinstance(module, nn.Linear) and ".layers." in path:
            kinds["attention" if ".attention." in path else "feed_forward"] |= own
    names = {name: name for name in sample.state_dict() if name.startswith("decoder.")}
    assert len(kinds["norms"]) == 4 * 4 + 1  # with those of queries and keys
    assert fitting("norms", names) == kinds["norms"]
    assert fitting("attention", names) - fitting("norms", names) == kinds["attention"]
    assert fitting("feed_forward", names) == kinds["feed_forward"]
    assert fitting("decoder", names) == set(names)
    assert fitting("embeddings", names) == {"decoder.tok_embeddings.weight"}
    assert {layer_of(name) for name in names} == {None, 0, 1, 2, 3}


def test_the_encoders_weights_are_no_norms_or_embeddings_of_the_decoder(sample: Sphinx) -> None:
    names = {name: name for name in sample.state_dict() if name.startswith("mixer.")}
    assert fitting("embeddings", names) == fitting("decoder", names) == set()
    assert fitting("encoders", names) | fitting("projections", names) == set(names)
    assert not fitting("encoders", names) & fitting("projections", names)
    assert {layer_of(name) for name in names} == {None}
    for name in fitting("norms", names):
        assert sample.get_parameter(name).ndim == 1, name


HUGGINGFACE = {
    "model.embed_tokens.weight": ("embeddings", None, {"embeddings", "decoder"}),
    "lm_head.weight": ("embeddings", None, {"embeddings", "decoder"}),
    "model.norm.weight": ("decoder", None, {"decoder", "norms"}),
    "model.layers.3.input_layernorm.weight": ("decoder", 3, {"decoder", "norms"}),
    "model.layers.3.post_attention_layernorm.weight": ("decoder", 3, {"decoder", "norms"}),
    "model.layers.12.self_attn.q_proj.weight": ("decoder", 12, {"decoder", "attention"}),
    "model.layers.12.mlp.up_proj.weight": ("decoder", 12, {"decoder", "feed_forward"}),
    "model.layers.0.self_attn.q_norm.weight": ("decoder", 0, {"decoder", "attention", "norms"}),
    "model.layers.0.block_sparse_moe.experts.7.w1.weight": ("decoder", 0, {"decoder", "feed_forward"}),
    "model.layers.0.block_sparse_moe.gate.weight": ("decoder", 0, {"decoder", "feed_forward"}),
    # InternLM2, LLaVA before and since transformers 4.52
    "model.tok_embeddings.weight": ("embeddings", None, {"embeddings", "decoder"}),
    "model.layers.1.attention.wqkv.weight": ("decoder", 1, {"decoder", "attention"}),
    "model.layers.1.feed_forward.w1.weight": ("decoder", 1, {"decoder", "feed_forward"}),
    "model.layers.1.ffn_norm.weight": ("decoder", 1, {"decoder", "norms"}),
    "language_model.model.layers.2.mlp.up_proj.weight": ("decoder", 2, {"decoder", "feed_forward"}),
    "language_model.output.weight": ("embeddings", None, {"embeddings", "decoder"}),
    "output.weight": ("embeddings", None, {"embeddings"}),
    # GPT-2 with and without its head, GPT-NeoX, MPT
    "transformer.wte.weight": ("embeddings", None, {"embeddings", "decoder"}),
    "wpe.weight": ("embeddings", None, {"embeddings"}),
    "transformer.h.11.attn.c_attn.weight": ("decoder", 11, {"decoder", "attention"}),
    "transformer.h.0.ln_1.weight": ("decoder", 0, {"decoder", "norms"}),
    "h.3.mlp.c_fc.weight": ("decoder", 3, {"decoder", "feed_forward"}),
    "gpt_neox.layers.5.attention.dense.weight": ("decoder", 5, {"decoder", "attention"}),
    "gpt_neox.final_layer_norm.weight": ("decoder", None, {"decoder", "norms"}),
    "transformer.blocks.2.ffn.up_proj.weight": ("decoder", 2, {"decoder", "feed_forward"}),
    "visual.blocks.4.attn.qkv.weight": ("encoders", None, {"encoders", "attention"}),
    "encoder.layer.0.output.dense.weight": ("other", None, set()),
    "model.encoder.layers.0.fc1.weight": ("other", None, set()),
    "model.decoder.layers.3.fc1.weight": ("decoder", 3, {"decoder"}),
    "model.audio_tower.layers.0.fc1.weight": ("encoders", None, {"encoders"}),
    "model.vision_backbone.blocks.1.fc1.weight": ("encoders", None, {"encoders"}),
    "model.connector.modality_projection.proj.weight": ("projections", None, {"projections"}),
    "multi_modal_projector.linear_1.weight": ("projections", None, {"projections"}),
    "model.multi_modal_projector.linear_1.weight": ("projections", None, {"projections"}),
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": ("encoders", None, {"encoders", "feed_forward"}),
    "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": ("encoders", None, {"encoders", "feed_forward"}),
    "model.vision_tower.vision_model.post_layernorm.weight": ("encoders", None, {"encoders", "norms"}),
}


def test_parts_of_hugging_faces_names(tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path / "hf", {name: torch.zeros(2) for name in HUGGINGFACE})
    (stored,) = with_common_names([open_model(folder)])
    for key, (part, layer, parts) in HUGGINGFACE.items():
        name = stored.canonical_name(key)
        assert part_of(name) == part, key
        assert layer_of(name) == layer, key
        assert {p for p in PARTS if PARTS[p](name)} == parts | {"all"}, key


PARENTS = {
    "encoders": (
        "transformer.vision.transformer.layers.0.attention.dense.weight",  # GLM-4V
        "transformer.visual.transformer.resblocks.0.attn.in_proj_weight",  # Qwen-VL
        "visual.blocks.0.attn.qkv.weight",  # Qwen2-VL
        "thinker.audio_tower.layers.0.fc1.weight",  # Qwen2.5-Omni
        "vision_model.encoder.layers.0.attn.qkv.weight",  # InternVL
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",  # LLaVA
        "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.0.mlp.fc1.weight",  # Phi-3-vision
        "model.vision_backbone.image_vit.transformer.resblocks.0.attention.wq.weight",  # Molmo
        "vpm.encoder.layers.0.self_attn.q_proj.weight",  # MiniCPM-V
        "apm.layers.0.fc1.weight",
        "vision_model.vision_tower.blocks.0.attn.qkv.weight",  # Janus
        "vision.vision_tower_high.vision_tower.blocks.0.norm1.weight",  # DeepSeek-VL
        "model.vqmodel.encoder.down.0.block.0.norm1.weight",  # Chameleon
        "model.sam_model.blocks.0.attn.qkv.weight",  # DeepSeek-OCR
        "qformer.encoder.layer.0.attention.attention.query.weight",  # BLIP-2
        "model.model.vision_model.encoder.layers.0.mlp.fc1.weight",
    ),
    "projections": (
        "transformer.vision.linear_proj.gate_proj.weight",
        "visual.merger.mlp.0.weight",
        "visual.deepstack_merger_list.0.norm.weight",
        "mlp1.1.weight",
        "model.mm_projector.0.weight",
        "model.image_newline",
        "model.vision_embed_tokens.img_projection.0.weight",
        "model.vision_backbone.image_projector.w1.weight",
        "resampler.attn.in_proj_weight",
        "aligner.layers.0.weight",
        "model.connector.perceiver_resampler.layers.0.self_attn.q_proj.weight",
        "language_projection.weight",
        "model.embed_vision.embedding_projection.weight",
    ),
    "decoder": (
        "transformer.encoder.layers.0.self_attention.dense.weight",
        "transformer.encoder.final_layernorm.weight",
        "transformer.h.0.attn.c_attn.weight",
        "thinker.model.layers.0.mlp.up_proj.weight",
        "llm.model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "model.text_model.layers.0.mlp.up_proj.weight",
        "model.transformer.blocks.0.ff_out.weight",
        "model.language_model.layers.0.mlp.vision_moe.gate.weight",  # ERNIE: experts of the decoder for image tokens
        "language_model.model.norm.weight",
    ),
    "other": (
        "generation_head.proj_out.weight",
        "model.encoder.layers.0.fc1.weight",
        "token2wav.code2wav_bigvgan_model.conv_pre.weight",
        "model.protein_encoder.model.encoder.layer.0.output.dense.weight",
        "blocks.0.attn.qkv.weight",
    ),
}


def test_a_part_is_recognised_by_its_parents(subtests: pytest.Subtests) -> None:
    for part, name in [(part, name) for part, names in PARENTS.items() for name in names]:
        with subtests.test(part=part, name=name):
            ours = FAMILIES["llama"].our_name(name)
            assert part_of(ours) == part
            assert [p for p in ("encoders", "projections", "decoder") if PARTS[p](ours)] == (
                [] if part == "other" else [part]
            )
            assert layer_of(ours) in ((0, None) if part == "decoder" else (None,))


ENCODERS = (
    *("vision_tower", "image_tower", "video_tower", "audio_tower", "vision_model", "visual", "vqmodel"),
    *("query_tokens", "qformer"),
)
PROJECTIONS = (
    *("multi_modal_projector", "connector", "aligner", "merger", "deepstack_merger_list", "language_projection"),
)
ARCHITECTURES = (
    *("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "paligemma", "gemma3", "idefics3"),
    *("smolvlm", "mllama", "mistral3", "blip-2", "qwen2_audio", "glm4v", "video_llava", "deepseek_vl"),
)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_parts_of_transformers_own_models(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2AudioForConditionalGeneration

    config = AutoConfig.for_model(kind)
    for section in vars(config).values():
        for key in ("num_hidden_layers", "depth", "num_layers", "num_global_layers"):
            if isinstance(getattr(section, key, None), int):
                setattr(section, key, 1)
        if getattr(section, "layer_types", None):
            section.layer_types = section.layer_types[:1]
    with torch.device("meta"):
        if kind == "qwen2_audio":
            model: nn.Module = Qwen2AudioForConditionalGeneration(config)
        else:
            model = AutoModelForImageTextToText.from_config(config)
    parts: dict[str, set[str]] = {}
    for name in model.state_dict():
        words = name.split(".")
        # A projection can lie in its encoder.
        ours = "projections" if {*words} & {*PROJECTIONS} else "encoders" if {*words} & {*ENCODERS} else ""
        found = part_of(FAMILIES["llama"].our_name(name))
        assert found == ours or (not ours and found in ("decoder", "embeddings", "projections")), name
        parts.setdefault(found, set()).add(name)
    assert {"decoder", "embeddings"} <= parts.keys()
    assert parts.keys() & {"encoders"}


ORIGINAL = {
    "tok_embeddings.weight": ("embeddings", None),
    "output.weight": ("embeddings", None),
    "norm.weight": ("decoder", None),
    "layers.0.attention.wq.weight": ("decoder", 0),
    "layers.0.feed_forward.w2.weight": ("decoder", 0),
    "layers.0.attention_norm.weight": ("decoder", 0),
    "visual_proj.0.weight": ("projections", None),
    "qformer_proj.1.bias": ("projections", None),
    "start_img": ("projections", None),
    "clip.visual.conv1.weight": ("clip", None),
    "openclip_convnext_xxl.stem.0.weight": ("convnext", None),
    "dinov2_vitg14.blocks.0.mlp.w12.weight": ("dinov2", None),
    "qformer.query_tokens": ("qformer", None),
}


@pytest.mark.parametrize("shards", [1, 2])
def test_parts_of_the_originals_names(tmp_path: Path, shards: int) -> None:
    folder = original_folder(tmp_path / "original", {name: torch.zeros(48, 16) for name in ORIGINAL}, shards)
    (stored,) = with_common_names([open_model(folder)])
    assert len(list(stored)) == shards * len(ORIGINAL)
    for key in stored:
        name = stored.canonical_name(key)
        assert (part_of(name), layer_of(name)) == ORIGINAL[key.partition("/")[2].removeprefix("llma.")], key


def test_the_first_rule_that_fits_wins() -> None:
    found = betas(
        {"match": "norms", "beta": 0.125},
        {"match": "decoder.layers.0.*", "beta": 0.25},
        {"match": ["attention", "mixer.visual_proj.?.weight"], "weights": [0.75, 0.25]},
        {"match": "encoders", "beta": 1},
    )
    assert found == {
        "decoder.tok_embeddings.weight": 0.5,
        "decoder.layers.0.attention.wq.weight": 0.25,
        **{name: 0.75 for name, layer in LAYERS.items() if layer},
        "decoder.layers.0.ffn_norm.weight": 0.125,
        "decoder.norm.weight": 0.125,
        "mixer.towers.clip.model.conv1.weight": 1,
        "mixer.visual_proj.0.weight": 0.75,
    }


def test_patterns_fit_our_names_and_the_files() -> None:
    names = {"model.layers.0.self_attn.q_proj.weight": "decoder.layers.0.attention.wq.weight"}
    for pattern in ("*.self_attn.*", "*.attention.*", "model.layers.0.self_attn.q_proj.weight", "*.w[qk].weight"):
        chosen, _ = resolve([{"match": pattern, "beta": 0.25}], None, names, check)
        assert chosen == {next(iter(names)): [0.25, 0.75]}, pattern
    with pytest.raises(UserError, match="fits nothing"):
        resolve([{"match": "*.ATTENTION.*", "beta": 0.25}], [0.5, 0.5], names, check)


def test_what_is_left_of_1_is_what_one_would_write(subtests: pytest.Subtests) -> None:
    for tenths in range(-5, 16):
        with subtests.test(tenths=tenths):
            written, rest = float(f"{tenths / 10:.1f}"), float(f"{(10 - tenths) / 10:.1f}")
            assert complement(written) == rest
            assert complement(rest) == written


def test_a_rule_without_match_is_for_all() -> None:
    assert set(betas({"beta": 0.25}, otherwise=None).values()) == {0.25}


LAYERS_OF_A_RULE = [
    ("2", {2}),
    (2, {2}),
    ("1-3", {1, 2, 3}),
    (" 1 - 3 ", {1, 2, 3}),
    ("0-1,4-5", {0, 1, 4, 5}),
    ("0, 3 ,5", {0, 3, 5}),
    ("4-", {4, 5}),
    ("-1", {0, 1}),
    ("3-3", {3}),
    ("4-99", {4, 5}),
    ("1-3,2-4", {1, 2, 3, 4}),
]


def test_layers(subtests: pytest.Subtests) -> None:
    for said, layers in LAYERS_OF_A_RULE:
        with subtests.test(said=said):
            found = betas({"match": "attention", "layers": said, "beta": 1})
            assert {layer for name, layer in LAYERS.items() if found[name] == 1} == layers
            assert [found[name] for name in NAMES if name not in LAYERS] == [0.5] * 5


@pytest.mark.parametrize(
    ("layers", "points", "expected"),
    [
        (None, [0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (None, [1.0, 0.0, 1.0], [1, 0.6, 0.2, 0.2, 0.6, 1]),  # at layers 0, 2.5 and 5
        ("2-4", [0.2, 0.8], [None, None, 0.2, 0.5, 0.8, None]),  # from the first layer that fits to the last
        ("0,4", [0.25, 0.75], [0.25, None, None, None, 0.75, None]),
        ("0,1,4", [0.0, 1.0], [0, 0.25, None, None, 1, None]),  # by depth, not by rank
        ("3", [0.25, 0.75], [None, None, None, 0.25, None, None]),
        (None, [0.0, 0.5, 0.5, 0.5, 0.5, 1.0], [0, 0.5, 0.5, 0.5, 0.5, 1]),
        (None, [0.3], [0.3] * 6),
    ],
)
def test_gradients_worked_by_hand(layers: str | None, points: list[float], expected: list[float | None]) -> None:
    for values in ({"beta": points}, {"weights": [[beta, 1 - beta] for beta in points]}):
        found = betas({"match": "attention", "layers": layers} | values, otherwise=[1.5, -0.5])
        assert [found[name] for name in LAYERS] == pytest.approx([1.5 if e is None else e for e in expected])


def test_a_gradient_fits_tensors_of_layers_only() -> None:
    found = betas({"match": "decoder", "beta": [0, 1]})
    assert found["decoder.norm.weight"] == found["decoder.tok_embeddings.weight"] == 0.5
    assert found["decoder.layers.5.attention.wq.weight"] == 1
    assert found["decoder.layers.0.ffn_norm.weight"] == 0


def test_without_rules_all_tensors_have_the_same_weights() -> None:
    chosen, rows = resolve([], [0.25, 0.75], {name: name for name in NAMES}, check)
    assert chosen == {name: [0.25, 0.75] for name in NAMES}
    assert [(row.label, row.weights, row.keys) for row in rows] == [("everything", ([0.25, 0.75],), tuple(NAMES))]
    chosen["decoder.norm.weight"][0] = 7
    assert chosen["mixer.visual_proj.0.weight"] == [0.25, 0.75]


REFUSED = [
    (
        [{"match": "towrs", "beta": 0}],
        [0.5, 0.5],
        "rules[0].match='towrs' is no part of a model and no pattern: did",
    ),
    ([{"match": 3, "beta": 0}], [0.5, 0.5], "rules[0].match=3 must be a part, a pattern of names, or a list of"),
    ([{"match": ["norms", 3], "beta": 0}], [0.5, 0.5], "rules[0].match=['norms', 3] must be"),
    ([{"match": "norms"}], [0.5, 0.5], "rules[0]: give either weights or beta"),
    ([{"match": "norms", "beta": 0, "weights": [0, 1]}], [0.5, 0.5], "rules[0]: give either weights or beta"),
    ([{"match": "norms", "beta": "half"}], [0.5, 0.5], "rules[0].beta=half must be a number, or a list of numbers"),
    ([{"match": "norms", "beta": True}], [0.5, 0.5], "rules[0].beta=True must be a number"),
    ([{"match": "norms", "beta": float("inf")}], [0.5, 0.5], "rules[0].beta=inf must be a number"),
    ([{"match": "norms", "beta": []}], [0.5, 0.5], "rules[0].beta=[] must be a number"),
    ([{"match": "norms", "beta": [[0.5]]}], [0.5, 0.5], "rules[0].beta=[[0.5]] must be a number"),
    ([{"match": "norms", "weights": [0.5, "x"]}], [0.5, 0.5], "rules[0].weights=[0.5, 'x'] must be numbers, or"),
    ([{"match": "norms", "weights": [[1, 0], 3]}], [0.5, 0.5], "rules[0].weights=[[1, 0], 3] must be numbers"),
    ([{"match": "norms", "weights": [3, [1, 0]]}], [0.5, 0.5], "rules[0].weights=[3, [1, 0]] must be numbers"),
    ([{"match": "norms", "weights": []}], [0.5, 0.5], "rules[0]: weights has 0 numbers for 2 checkpoints"),
    ([{"match": "norms", "weights": [1]}], [0.5, 0.5], "rules[0]: weights has 1 numbers for 2 checkpoints"),
    ([{"match": "norms", "weights": [1, 1]}], [0.5, 0.5], "rules[0]: weights=[1, 1] sum to 2, not 1"),
    ([{"match": "norms", "weights": [[1, 0], [1, 1]]}], [0.5, 0.5], "rules[0]: weights=[1, 1] sum to 2, not 1"),
    (
        [{"match": "norms", "wieghts": [1, 0]}],
        [0.5, 0.5],
        "there is no key rules[0].wieghts: did you mean rules[0].weights?",
    ),
    ([{"beta": 0, "layers": "a-b"}], [0.5, 0.5], "rules[0].layers='a-b' must be layers of the decoder, such as"),
    ([{"beta": 0, "layers": ""}], [0.5, 0.5], "rules[0].layers='' must be layers"),
    ([{"beta": 0, "layers": "-"}], [0.5, 0.5], "rules[0].layers='-' must be layers"),
    ([{"beta": 0, "layers": "1,,2"}], [0.5, 0.5], "rules[0].layers='1,,2' must be layers"),
    ([{"beta": 0, "layers": "1 3"}], [0.5, 0.5], "rules[0].layers='1 3' must be layers"),
    ([{"beta": 0, "layers": "1-2-3"}], [0.5, 0.5], "rules[0].layers='1-2-3' must be layers"),
    ([{"beta": 0, "layers": "5-3"}], [0.5, 0.5], "rules[0].layers='5-3': 5 is after 3"),
    ([{"beta": 0, "layers": "6-"}], [0.5, 0.5], "rules[0] (match=all, layers=6-) fits nothing: no tensor is there"),
    ([{"match": "towers", "beta": 1}], [0.5, 0.5], "rules[0].match=towers is called encoders now"),
    (
        [{"match": "encoders", "beta": [0, 1]}],
        [0.5, 0.5],
        "rules[0] (match=encoders, layers=None) fits nothing: no",
    ),
    (
        [{"beta": 0}, {"match": "norms", "beta": 1}],
        None,
        "rules[1] (match=norms, layers=None) fits nothing: rules before it take all of them",
    ),
    (
        [{"match": "norms", "beta": 1}],
        None,
        "no rule fits 'decoder.tok_embeddings.weight' and 8 more tensors: give weights or beta for the rest",
    ),
    (["norms"], [0.5, 0.5], "rules[0]=norms must be keys and values, such as {match: norms, beta: 0.2}"),
    ([["norms", 0.5]], [0.5, 0.5], "rules[0]=['norms', 0.5] must be keys and values"),
]


def test_rules_that_cannot_be_are_refused_in_one_line(subtests: pytest.Subtests) -> None:
    for rules, otherwise, message in REFUSED:
        with subtests.test(rules=rules):
            with pytest.raises(UserError) as error:
                resolve(rules, otherwise, {name: name for name in NAMES}, check)
            assert str(error.value).startswith(message)
            assert "\n" not in str(error.value)


def test_the_tables_rows() -> None:
    rules: list[dict[str, Any]] = [
        {"match": ["norms", "projections"], "beta": 0.125},
        {"match": "attention", "layers": "1-3", "beta": [0.25, 1, 0.75]},
    ]
    chosen, rows = resolve(rules, [0.5, 0.5], {name: name for name in NAMES}, check)
    assert [row.label for row in rows] == ["norms, projections", "attention, layers 1-3", "the rest"]
    assert [len(row.keys) for row in rows] == [3, 3, 5]
    assert sorted(key for row in rows for key in row.keys) == sorted(chosen) == sorted(NAMES)
    table = rules_table(rows, {name: 1000 + i for i, name in enumerate(NAMES)}, 2)
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    lines = [line.replace("│", " ").split() for line in out.getvalue().splitlines()]
    text = out.getvalue()
    assert ["norms,", "projections", "0.125", "0.875", "3", "3,025"] in lines  # 1007 + 1008 + 1010
    assert next(line[:3] for line in lines if line[:1] == ["attention,"]) == ["attention,", "layers", "1-3"]
    assert "0.25 → 1 → 0.75" in text
    assert ["the", "rest", "0.5", "0.5", "5", "5,021"] in lines
