"""Families of language models against their classes in transformers, on random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from sphinx_pl.checkpoints.families import FAMILIES
from sphinx_pl.checkpoints.format import Checkpoint, open_checkpoint
from sphinx_pl.checkpoints.huggingface import write_huggingface
from sphinx_pl.cli.checkpoint import main
from sphinx_pl.models.decoder import Decoder, KVCache
from sphinx_pl.utils.errors import UserError

TOKENIZER = Path(__file__).parent.parent / "golden" / "tokenizer.model"
LENGTH = 48
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-4,
    "rope_theta": 500.0,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.5, 7.0], "type": "longrope"}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "vocab_size": 64}),
    "llama, heads of another size": ("llama", {"head_dim": 16}),
    "llama, linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama 3.1": ("llama", {"rope_scaling": LLAMA3}),
    "llama, yarn": ("llama", {"rope_scaling": YARN}),
    "llama, yarn, not rounded": ("llama", {"rope_scaling": YARN | {"truncate": False, "attention_factor": 1.5}}),
    "llama, dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral nemo": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", WINDOWS),
    "qwen2.5, yarn": ("qwen2", {"rope_scaling": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, windows": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 12, "norm_topk_prob": True}),
    "qwen3_moe, window": ("qwen3_moe", EXPERTS | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 6}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3, windows": ("smollm3", {"no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": 5}),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi3.5, long": ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 16}),
    "phi3.5, short": ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 50}),
    "phi4-mini": ("phi3", {"head_dim": None, "hidden_size": 96, "partial_rotary_factor": 0.75, "rope_scaling": None}),
}


def reference(name: str, changes: dict[str, Any]) -> Any:
    """Return the class of transformers with weights that give logits a spread of about 1."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    values = {key: value for key, value in (SIZES | changes).items() if value is not None or key == "sliding_window"}
    config = transformers.AutoConfig.for_model(name, **values)
    model = getattr(transformers, family.architecture)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in key else 0.1 * noise)
    return model


def loaded(checkpoint: Checkpoint) -> Decoder:
    decoder = Decoder(checkpoint.model_config.decoder).eval()
    checkpoint.load_into(decoder, "decoder.")
    return decoder


def logits(decoder: Decoder, ids_BT: Tensor, chunks: list[int] | None = None) -> Tensor:
    """The logits of a decoder, with a cache if the ids come in chunks."""
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    if chunks is None:
        return decoder.logits(decoder(decoder.embed(ids_BT), positions_BT))
    cache, parts = KVCache(decoder.config.layers, ids_BT.shape[1]), []
    for ids, positions in zip(ids_BT.split(chunks, dim=1), positions_BT.split(chunks, dim=1), strict=True):
        parts.append(decoder.logits(decoder(decoder.embed(ids), positions, None, cache)))
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_and_files_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    name, changes = CASES[case]
    model = reference(name, changes)
    model.save_pretrained(tmp_path / "theirs")
    shutil.copy(TOKENIZER, tmp_path / "theirs")
    checkpoint = open_checkpoint(tmp_path / "theirs")
    decoder = loaded(checkpoint)

    ids_BT = torch.randint(61, (2, LENGTH))
    expected = model(ids_BT).logits
    assert expected.std() > 0.5
    for chunks in (None, [LENGTH // 2, 5, *[1] * (LENGTH // 2 - 5)]):
        torch.testing.assert_close(logits(decoder, ids_BT, chunks), expected, atol=1e-5, rtol=1e-5)
    with torch.enable_grad():  # the training kernel
        torch.testing.assert_close(logits(decoder, ids_BT), expected, atol=1e-5, rtol=1e-5)

    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    write_huggingface(open_checkpoint(tmp_path / "ours"), tmp_path / "exported", name)
    tensors = [
        {key: value for file in (tmp_path / folder).glob("*.safetensors") for key, value in load_file(file).items()}
        for folder in ("theirs", "exported")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(exported) is type(model)
    torch.testing.assert_close(exported(ids_BT).logits, expected, atol=0, rtol=0)
    assert open_checkpoint(tmp_path / "exported").model_config.decoder == checkpoint.model_config.decoder


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str, dict[str, Any]], Path]:
    """Return a function that writes a folder without weights."""

    def write(name: str, changes: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": name} | changes))
        return tmp_path

    return write


REFUSED: list[tuple[str, str, Any]] = [
    ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "hidden_act", "gelu"),
    ("llama", "clip_qkv", 8.0),
    ("llama", "logit_scale", 0.5),
    ("llama", "residual_multiplier", 0.22),
    ("llama", "attn_logit_softcapping", 50.0),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "sliding_window", 16),
    ("llama", "rope_interleaved", True),
    ("llama", "a_key_of_next_year", 3),
    ("llama", "rope_scaling", {"rope_type": "proportional", "factor": 2.0}),
    ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000}),
    ("qwen2", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
    ("qwen3", "attention_bias", True),
    ("qwen3_moe", "decoder_sparse_step", 2),
    ("qwen3_moe", "mlp_only_layers", [0]),
    ("smollm3", "no_rope_layers", [1]),
    ("phi3", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ("internlm2", "bias", True),
]


@pytest.mark.parametrize(("name", "key", "value"), REFUSED, ids=str)
def test_keys_that_change_the_maths_are_refused_by_name(
    folder: Callable[[str, dict[str, Any]], Path], name: str, key: str, value: Any
) -> None:
    part = "alpha" if isinstance(value, dict) and "alpha" in value else key
    with pytest.raises(UserError, match=rf"config\.json': (rope_scaling\.)?{part}="):
        open_checkpoint(folder(name, {key: value}))


HOSTILE = [{"rope_scaling": {"rope_type": "longrope", "short_factor": value}} for value in (3, ["x"], [1.0], {}, [[]])]
HOSTILE += [{"rope_scaling": value} for value in ("yarn", [1], {"rope_type": ["yarn"]}, {"rope_type": "yarn"})]
HOSTILE += [{"head_dim": value} for value in (-2, 7, "x", 2.5)]
HOSTILE += [{"layer_types": value} for value in (3, "x", [3], [[]])]
HOSTILE += [{"partial_rotary_factor": "x"}, {"sliding_window": "x"}, {"tie_word_embeddings": "x"}, {"rope_theta": {}}]


@pytest.mark.parametrize("changes", HOSTILE, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_value_that_cannot_be_is_one_line(
    folder: Callable[[str, dict[str, Any]], Path], name: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(UserError):
        open_checkpoint(folder(name, {"use_sliding_window": True} | changes))
