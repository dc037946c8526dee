from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.checkpoint.huggingface import belongs, config_difference, tokenizer_difference, weight_files
from sphinx_pl.errors import UserError

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5e5}
PIPELINE: dict[str, Any] = {
    "added_tokens": [{"id": 2, "content": "</s>", "special": True}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": ["a b", "b a"], "dropout": None},
}


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token_id": 0},
        {"eos_token_id": [2, 7]},
        {"attention_dropout": 0.1, "initializer_range": 0.01},
        {"architectures": ["LlamaModel"], "auto_map": {"AutoConfig": "a.b"}, "_name_or_path": "here"},
        {"max_position_embeddings": 8192, "use_cache": False, "unsloth_version": "2025"},
        {"head_dim": 16, "attention_bias": False},  # as the defaults are
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
def test_configs_of_one_model(change: dict[str, Any]) -> None:
    other = {key: value for key, value in (LLAMA | change).items() if value is not None}
    assert config_difference(LLAMA, other) == ""
    assert config_difference(other, LLAMA) == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, "rope_parameters"),
        ({"head_dim": 32}, "config.json.head_dim is 16 and 32"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"model_type": "mistral"}, "model_type"),
        ({"image_token_id": 7}, "image_token_id"),
        ({"text_config": {"hidden_size": 3}}, "text_config.hidden_size"),
    ],
)
def test_configs_of_different_models(change: dict[str, Any], named: str) -> None:
    assert named in config_difference(LLAMA, LLAMA | change) or named in config_difference(LLAMA | change, LLAMA)


def test_configs_that_no_installed_program_knows_are_compared_as_they_are() -> None:
    unknown = {"model_type": "mamba9", "size": 4, "pad_token_id": 1}
    assert config_difference(unknown, unknown | {"pad_token_id": 2}) == ""
    assert config_difference(unknown, unknown | {"size": 5}) == "config.json.size is 4 and 5"
    # Nor is a broken one of a known model the end of the run.
    broken = LLAMA | {"num_attention_heads": "four"}
    assert "num_attention_heads" in config_difference(LLAMA, broken)


def folder(path: Path, files: dict[str, Any]) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": PIPELINE | {"model": PIPELINE["model"] | {"merges": [["a", "b"], ["b", "a"]]}}},
        {"tokenizer.json": PIPELINE | {"model": PIPELINE["model"] | {"ignore_merges": False, "byte_fallback": False}}},
        {"tokenizer.json": PIPELINE | {"added_tokens": [{"id": 2, "content": "</s>", "special": False}]}},
        {"tokenizer.json": PIPELINE | {"post_processor": {"type": "TemplateProcessing"}, "padding": {"length": 3}}},
        {"vocab.json": '{"b":1,  "a":0}', "merges.txt": "a b\nb a\n"},
        {"config.json": "{}"},  # weights alone: there is nothing to compare
    ],
)
def test_tokenizers_written_differently_are_the_same(tmp_path: Path, files: dict[str, Any]) -> None:
    known = {"tokenizer.json": PIPELINE, "vocab.json": {"a": 0, "b": 1}, "merges.txt": "#version: 0.2\na b\nb a"}
    assert tokenizer_difference(folder(tmp_path / "a", known), folder(tmp_path / "b", files)) == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", PIPELINE | {"normalizer": {"type": "Lowercase"}}),
        ("tokenizer.json", PIPELINE | {"pre_tokenizer": None}),
        ("tokenizer.json", PIPELINE | {"model": PIPELINE["model"] | {"type": "WordPiece"}}),
        ("tokenizer.json", PIPELINE | {"model": PIPELINE["model"] | {"merges": ["b a", "a b"]}}),
        ("tokenizer.json", PIPELINE | {"model": PIPELINE["model"] | {"byte_fallback": True}}),
        ("tokenizer.json", PIPELINE | {"added_tokens": [{"id": 2, "content": "<pad>"}]}),
        ("vocab.json", {"a": 1, "b": 0}),
        ("merges.txt", "#version: 0.2\nb a\na b"),
        ("vocab.txt", "b\na"),
        ("spiece.model", "other pieces"),
        ("tokenizer.model", "other pieces"),
    ],
)
def test_other_tokenizers_are_named_by_their_file(tmp_path: Path, name: str, content: Any) -> None:
    same = {
        "tokenizer.json": PIPELINE,
        "vocab.json": {"a": 0, "b": 1},
        "merges.txt": "#version: 0.2\na b\nb a",
        "vocab.txt": "a\nb",
        "spiece.model": "pieces",
        "tokenizer.model": "pieces",
    }
    a, b = folder(tmp_path / "a", same), folder(tmp_path / "b", same | {name: content})
    assert tokenizer_difference(a, b) == name
    assert tokenizer_difference(a, a) == ""


@pytest.mark.parametrize("content", ["[1]", "{", '{"model": 3}', '{"added_tokens": [1]}', '{"model": {"merges": 3}}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    a = folder(tmp_path / "a", {"tokenizer.json": PIPELINE})
    b = folder(tmp_path / "b", {"tokenizer.json": content})
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizer_difference(a, b)


def test_pickled_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    files = {"config.json": {"model_type": "llama"}, "pytorch_model.bin": "pickle"}
    path = folder(tmp_path / "old", files)
    with pytest.raises(UserError, match=r"pytorch_model\.bin' is not read: .*save_pretrained"):
        weight_files(path)
    (path / "model.safetensors").touch()
    assert weight_files(path) == ["model.safetensors"]


def test_what_belongs_to_a_model() -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt"):
        assert belongs(name)
    for name in ("modeling_x.py", "chat_template.jinja", "preprocessor_config.json", "added_tokens.json", "LICENSE"):
        assert belongs(name)
    for name in ("README.md", "trainer_state.json", "all_results.json", "training_args.bin", "runs.zip", "x.gguf"):
        assert not belongs(name)
