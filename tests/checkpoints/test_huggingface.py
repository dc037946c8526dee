from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from sphinx_pl.checkpoints.huggingface_files import belongs, config_difference, tokenizer_difference, weight_files
from sphinx_pl.utils.errors import UserError

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5e5}
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def gpt2() -> dict[str, Any]:
    """A tokenizer.json of bytes, as GPT-2's, in the words of its publishers: defaults are left out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps, WE'LL see 1234 and 5678 abc ABC"] * 9, trainer)
    tokenizer.add_tokens([AddedToken("<box>", normalized=False)])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    del content["pre_tokenizer"]["use_regex"]
    return content


@pytest.fixture(scope="module")
def llama() -> dict[str, Any]:
    """As that of LLaMA-2: spaces become ▁ when text is normalized, and nothing cuts before the merges do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False, max_token_length=9)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def changed(content: dict[str, Any], change: Change) -> dict[str, Any]:
    content = copy.deepcopy(content)
    change(content)
    return content


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token_id": 0},
        {"eos_token_id": [2, 7]},
        {"attention_dropout": 0.1, "initializer_range": 0.01},
        {"architectures": ["LlamaModel"], "auto_map": {"AutoConfig": "a.b"}, "_name_or_path": "here"},
        {"max_position_embeddings": 8192, "use_cache": False, "unsloth_version": "2025"},
        {"head_dim": 16, "attention_bias": False},  # as the defaults are
        {"use_mrope": False, "quantization_config": None},  # which the class doesn't know
        {"tokenizer_class": "X", "torchscript": True, "task_specific_params": {"a": {"b": 1}}},
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
        ({"model_type": "mistral"}, "config.json.model_type is"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"use_mrope": True}, "use_mrope"),
        ({"output_stride": 16}, "output_stride"),
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


def other_form(merge: Any) -> Any:
    return merge.split(" ") if isinstance(merge, str) else " ".join(merge)


SAME: list[Change] = [
    lambda c: c["pre_tokenizer"].update(use_regex=True),  # the default
    lambda c: c["pre_tokenizer"].update(trim_offsets=False),
    lambda c: c["model"].update(merges=[other_form(merge) for merge in c["model"]["merges"]]),
    lambda c: c["model"].update(ignore_merges=False, dropout=None, continuing_subword_prefix=""),
    lambda c: c["added_tokens"][0].update(normalized=True),  # of a special token
    lambda c: c.update(post_processor=None, padding=None, decoder=None),
]
OTHERS: list[Change] = [
    lambda c: c.update(normalizer={"type": "Lowercase"}),
    lambda c: c.update(normalizer={"type": "NFKC"}),
    lambda c: c.update(pre_tokenizer=None),
    lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    lambda c: c["model"].update(merges=c["model"]["merges"][::-1]),
    lambda c: c["model"].update(type="WordLevel", unk_token="</s>"),
    lambda c: c["added_tokens"][0].update(content="<pad>"),
    lambda c: c["added_tokens"][1].update(lstrip=True),
    lambda c: c["added_tokens"][1].update(single_word=True),
    lambda c: c.update(normalizer={"type": "Nonsense"}),
]


@pytest.mark.parametrize("change", SAME)
def test_a_tokenizer_in_other_words_is_the_same(tmp_path: Path, gpt2: dict[str, Any], change: Change) -> None:
    a = folder(tmp_path / "a", {"tokenizer.json": gpt2})
    b = folder(tmp_path / "b", {"tokenizer.json": changed(gpt2, change)})
    assert tokenizer_difference(a, b) == tokenizer_difference(b, a) == ""


@pytest.mark.parametrize("change", OTHERS)
def test_another_way_to_cut_text_is_another_tokenizer(tmp_path: Path, gpt2: dict[str, Any], change: Change) -> None:
    a = folder(tmp_path / "a", {"tokenizer.json": gpt2})
    b = folder(tmp_path / "b", {"tokenizer.json": changed(gpt2, change)})
    assert tokenizer_difference(a, b) == tokenizer_difference(b, a) == "tokenizer.json"


def test_llamas_two_forms_of_one_tokenizer(tmp_path: Path, llama: dict[str, Any]) -> None:
    """As transformers writes it since version 5."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    newer = llama | {"normalizer": None, "pre_tokenizer": metaspace}
    a, b = folder(tmp_path / "a", {"tokenizer.json": llama}), folder(tmp_path / "b", {"tokenizer.json": newer})
    assert tokenizer_difference(a, b) == ""
    never = newer | {"pre_tokenizer": metaspace | {"prepend_scheme": "never"}}
    assert tokenizer_difference(a, folder(tmp_path / "c", {"tokenizer.json": never})) == "tokenizer.json"


def test_what_only_one_folder_has_is_not_compared(tmp_path: Path, gpt2: dict[str, Any]) -> None:
    pieces = {"vocab.json": {"a": 0, "b": 1}, "merges.txt": "#version: 1\na b"}
    a = folder(tmp_path / "a", {"tokenizer.json": gpt2, **pieces})
    b = folder(tmp_path / "b", {"vocab.json": '{"b":1,  "a":0}', "merges.txt": "a b\n"})
    assert tokenizer_difference(a, b) == ""
    assert tokenizer_difference(a, folder(tmp_path / "weights", {"config.json": "{}"})) == ""


PIECES = (
    *("vocab.txt", "spiece.model", "tokenizer.model", "tekken.json", "x.tiktoken"),
    *("source.spm", "vocab.bpe", "bpe.codes"),
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", {"a": 1, "b": 0}),
        ("added_tokens.json", {"<|im_start|>": 301}),
        ("tokenizer_config.json", {"do_lower_case": False, "model_max_length": 8}),
        ("merges.txt", "#version: 0.2\nb a\na b"),
        *((name, "other pieces") for name in PIECES),
    ],
)
def test_other_tokenizers_are_named_by_their_file(tmp_path: Path, name: str, content: Any) -> None:
    same = {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<|im_start|>": 300}, "merges.txt": "a b\nb a"}
    same |= {"tokenizer_config.json": {"do_lower_case": True, "model_max_length": 512}}
    same |= dict.fromkeys(PIECES, "pieces")
    a, b = folder(tmp_path / "a", same), folder(tmp_path / "b", same | {name: content})
    assert tokenizer_difference(a, b) == name
    assert tokenizer_difference(a, a) == ""


@pytest.mark.parametrize("content", ["[1]", "{", '{"model": 3}', '{"added_tokens": [1]}', '{"model": {"merges": 3}}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, gpt2: dict[str, Any], content: str) -> None:
    a = folder(tmp_path / "a", {"tokenizer.json": gpt2})
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


def test_a_single_file_goes_before_shards_that_lie_there_too(tmp_path: Path) -> None:
    """As `from_pretrained` has it: a fine-tuned model may have been saved over a sharded download."""
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    path = folder(tmp_path / "both", {"model.safetensors.index.json": index})
    assert weight_files(path) == ["model-00001-of-00001.safetensors"]
    (path / "model.safetensors").touch()
    assert weight_files(path) == ["model.safetensors"]


def test_what_belongs_to_a_model() -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt"):
        assert belongs(name)
    for name in (
        "vocab.target.json",
        "modeling_x.py",
        "chat_template.jinja",
        "modules.json",
        "source.spm",
        "bpe.codes",
        "LICENSE",
    ):
        assert belongs(name)
    for name in (
        "README.md",
        "trainer_state.json",
        "all_results.json",
        "training_args.bin",
        "runs.zip",
        "x.gguf",
        "latest",
        "runs",
    ):
        assert not belongs(name)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "provenance.json", ".gitignore"):
        assert not belongs(name)
