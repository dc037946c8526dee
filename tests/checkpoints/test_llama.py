"""Decoders of Meta and Hugging Face: the same logits in every layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sphinx_pl.checkpoints.families import family_of
from sphinx_pl.checkpoints.families.base import half_split, interleave
from sphinx_pl.checkpoints.format import Checkpoint, open_checkpoint
from sphinx_pl.checkpoints.huggingface import write_huggingface
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.checkpoints.original import decoder_config
from sphinx_pl.checkpoints.torch_shards import open_tensors, split
from sphinx_pl.cli.checkpoint import main
from sphinx_pl.models.config import DecoderConfig, RopeScaling, SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.conftest import transformers_decoder

TOKENIZER = Path(__file__).parent.parent / "golden" / "tokenizer.model"
SIZES = DecoderConfig(vocab_size=61, width=48, layers=2, heads=6, kv_heads=2, ffn_width=80, max_positions=64)


def text_only(**changes: Any) -> Sphinx:
    torch.manual_seed(0)
    return Sphinx(SphinxConfig(decoder=DecoderConfig(**{**vars(SIZES), **changes}), vision=None)).eval()


@torch.no_grad()
def logits(model: Sphinx) -> Tensor:
    ids = torch.arange(20)[None] % 61
    decoder = model.decoder
    return decoder.logits(decoder(decoder.embed(ids), torch.arange(20)[None]))


def loaded(checkpoint: Checkpoint) -> Sphinx:
    model = Sphinx(checkpoint.model_config).eval()
    checkpoint.load_into(model)
    return model


def ours(model: Sphinx, path: Path) -> Checkpoint:
    write_checkpoint(path, model.state_dict(), model.config.to_dict(), {}, TOKENIZER, {"stage": None})
    return open_checkpoint(path)


def theirs(model: Sphinx) -> Any:
    torch.manual_seed(1)
    return transformers_decoder(model.config.decoder)


def test_rotary_halves_and_pairs_are_inverse() -> None:
    weight = torch.arange(24.0)[:, None]
    assert torch.equal(half_split(interleave(weight, 3), 3), weight)
    assert interleave(weight, 3)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("experts", [0, 4], ids=["llama", "mixtral"])
def test_transformers_own_folder_gives_its_logits(tmp_path: Path, experts: int) -> None:
    reference = theirs(text_only(experts=experts))
    reference.save_pretrained(tmp_path / "hf")
    shutil.copy(TOKENIZER, tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert checkpoint.model_config.vision is None
    assert checkpoint.model_config.decoder.experts == experts
    expected = reference(torch.arange(20)[None] % 61).logits
    torch.testing.assert_close(logits(loaded(checkpoint)), expected, atol=1e-5, rtol=1e-5)


EXPORTED: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"tie_embeddings": True}),
    ("Qwen3ForCausalLM", {"qk_norm": True}),
    ("Qwen3ForCausalLM", {"qk_norm": True, "tie_embeddings": True, "kv_heads": 3}),
    ("MixtralForCausalLM", {"experts": 4}),
    ("MixtralForCausalLM", {"experts": 3, "experts_per_token": 1, "tie_embeddings": True}),
]


@pytest.mark.parametrize(("kind", "changes"), EXPORTED, ids=str)
def test_transformers_reads_what_is_exported(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    import transformers

    model = text_only(rope_theta=500.0, norm_eps=1e-3, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # new norms are ones, which hide their order
            if "norm" in name:
                parameter.copy_(1 + 0.5 * torch.randn_like(parameter))
    write_huggingface(ours(model, tmp_path / "ours"), tmp_path / "hf")
    assert family_of(model.config.decoder).architecture == kind
    reference, report = getattr(transformers, kind).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    torch.testing.assert_close(reference(torch.arange(20)[None] % 61).logits, logits(model), atol=1e-5, rtol=0)
    again = open_checkpoint(tmp_path / "hf")
    sizes = vars(model.config.decoder) | {"balance_weight": again.model_config.decoder.balance_weight}
    assert vars(again.model_config.decoder) == sizes
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.tensor(name), tensor), name


def test_internlm2s_fused_attention(tmp_path: Path) -> None:
    model = text_only()
    state = {name.removeprefix("decoder."): value for name, value in model.state_dict().items()}
    folder = tmp_path / "internlm2"
    folder.mkdir()
    c, tensors = SIZES, {"output.weight": state.pop("output.weight")}
    for layer in range(c.layers):
        q, k, v = (state.pop(f"layers.{layer}.attention.w{kind}.weight") for kind in "qkv")
        parts = [half_split(q, c.heads), half_split(k, c.kv_heads), v]
        fused = torch.cat([part.unflatten(0, (c.kv_heads, -1, c.head_dim)) for part in parts], dim=1)
        tensors[f"model.layers.{layer}.attention.wqkv.weight"] = fused.flatten(0, 2).contiguous()
    save_file({**tensors, **{f"model.{name}": value for name, value in state.items()}}, folder / "model.safetensors")
    sizes = {"model_type": "internlm2", "vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "bias": False}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 80, "rms_norm_eps": 1e-5}
    sizes |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 10000, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(sizes))
    assert torch.equal(logits(loaded(open_checkpoint(folder))), logits(model))


@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_own_files(tmp_path: Path, ranks: int) -> None:
    model = text_only(ffn_width=128, vocab_size=64)
    state = {name.removeprefix("decoder."): value for name, value in model.state_dict().items()}
    state["rope.freqs"] = torch.zeros(4)
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    for rank in range(ranks):
        part = {name: split(name, value, ranks)[rank].clone() for name, value in state.items()}
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    sizes = {
        "dim": 48,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "multiple_of": 64,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(sizes))
    shutil.copy(TOKENIZER, tmp_path)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer_file.is_file()
    assert torch.equal(logits(loaded(checkpoint)), logits(model))


def test_metas_scaled_rotary_embeddings() -> None:
    sizes = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024, "norm_eps": 1e-5}
    sizes |= {"ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "use_scaled_rope": True}
    config = decoder_config(sizes, 128256)
    assert (config.ffn_width, config.rope_scaling) == (14336, RopeScaling("llama3", 8.0, 8192))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_huggingface(ours(text_only(), tmp_path / "ours"), tmp_path / "hf")
    return tmp_path / "hf"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file)
    (folder / "model.safetensors.index.json").unlink()
    file.rename(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), r"1 missing: 'decoder.norm.weight'"),
        (lambda state: state.update({"model.bias": torch.zeros(2)}), r"1 unexpected: 'model.bias'"),
        (lambda state: state.update({"lm_head.weight": torch.zeros(60, 48)}), r"'decoder.output.weight' is \[60, 48\]"),
    ],
)
def test_other_tensors_are_named(folder: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    rewrite(folder, change)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UserError, match=message):
        checkpoint.load_into(Sphinx(checkpoint.model_config))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt2", "model_type 'gpt2' cannot be read"),
        ("attention_bias", True, "attention_bias=True"),
        ("rope_scaling", {"rope_type": "llama3"}, "rope_scaling"),
        ("hidden_size", None, "config.json"),
        ("sliding_window", 4096, "sliding_window=4096"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(folder: Path, key: str, value: Any, message: str) -> None:
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | {key: value}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"lm_head.weight": "../../other.safetensors"}])
def test_an_index_names_files_beside_it(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="weight_map"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [0, "six", [6]])
def test_a_size_that_cannot_be_is_one_line(folder: Path, value: Any) -> None:
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | {"num_attention_heads": value}))
    with pytest.raises(UserError):
        open_checkpoint(folder)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['HOSTILE']}",)


def test_a_hostile_file_of_metas_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTILE", str(tmp_path / "executed"))
    torch.save({"norm.weight": Hostile()}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(UserError, match="something else than tensors"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_parameters_are_tensors_too(tmp_path: Path) -> None:
    """`dict(model.named_parameters())`, saved, needs gradients."""
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pth")
    assert not open_tensors(tmp_path / "x.pth", lambda content: content)["w"].requires_grad


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "tensors by name"),
        ([torch.ones(2)], "tensors by name"),
        ({"model": {"w": torch.ones(2).to_sparse()}}, "'w' in .* is not plain numbers"),
        ({"model": {"w": torch.ones(2, dtype=torch.complex64)}}, "'w' in .* is not plain numbers"),
        ({"model": {"w": torch.ones(2, device="meta")}}, "'w' in .* is not plain numbers"),
    ],
)
def test_what_holds_no_plain_tensors_is_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        open_tensors(tmp_path / "x.pth", lambda content: content["model"])


def test_a_decoder_that_no_class_computes_is_not_exported(tmp_path: Path) -> None:
    checkpoint = ours(text_only(qkv_bias=True, experts=4), tmp_path / "ours")
    message = "the nearest, MixtralForCausalLM, has no qkv_bias=True.*, which is not exported"
    with pytest.raises(UserError, match=message) as error:
        write_huggingface(checkpoint, tmp_path / "hf")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_without_an_output_head(tmp_path: Path, tied: bool) -> None:
    reference = theirs(text_only())
    reference.config.tie_word_embeddings = tied
    reference.model.save_pretrained(tmp_path / "hf")
    shutil.copy(TOKENIZER, tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert main(["show", str(tmp_path / "hf")]) == 0
    if not tied:
        with pytest.raises(UserError, match=r"has no output head \(lm_head\.weight\): it was saved from LlamaModel"):
            loaded(checkpoint)
        return
    hidden = reference.model(torch.arange(20)[None] % 61).last_hidden_state
    expected = hidden @ reference.model.embed_tokens.weight.T
    torch.testing.assert_close(logits(loaded(checkpoint)), expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_the_embedding_and_computed_angles_say_nothing_new(tmp_path: Path) -> None:
    model = text_only(tie_embeddings=True)
    write_huggingface(ours(model, tmp_path / "ours"), tmp_path / "hf")
    (file,) = (tmp_path / "hf").glob("model-*.safetensors")
    tensors = load_file(file)
    angles = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    for head, same in ((tensors["model.embed_tokens.weight"], True), (torch.zeros(61, 48), False)):
        save_file(tensors | angles | {"lm_head.weight": head.clone()}, tmp_path / "hf" / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path / "hf")
        if same:
            assert torch.equal(logits(loaded(checkpoint)), logits(model))
        else:
            with pytest.raises(UserError, match=r"1 unexpected: 'lm_head\.weight'"):
                loaded(checkpoint)


@pytest.mark.parametrize("there", [["00"], ["01"], ["00", "02"]])
def test_a_shard_that_is_missing_is_named(tmp_path: Path, there: list[str]) -> None:
    tensors = {
        name.removeprefix("decoder."): value
        for name, value in text_only(vocab_size=60, kv_heads=6, ffn_width=96).state_dict().items()
    }
    (tmp_path / "params.json").write_text(json.dumps({"dim": 48, "n_layers": 2, "n_heads": 6}))
    for rank in there:
        part = {name: split(name, value, 3)[int(rank)].clone() for name, value in tensors.items()}
        torch.save(part, tmp_path / f"consolidated.{rank}.pth")
    missing = next(rank for rank in ("00", "01", "02") if rank not in there)
    with pytest.raises(UserError, match=rf"consolidated\.{missing}\.pth' is missing: copy all 3 shards of this model"):
        open_checkpoint(tmp_path)
