"""What is no checkpoint is called what it is; what is no plain model is refused, wherever it is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.huggingface import open_model
from sphinx_pl.cli.checkpoint import import_checkpoint
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.mixing.mix import mix_checkpoints
from sphinx_pl.utils.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 8}
LLAMA |= {"intermediate_size": 8, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "it is an adapter .*merge it into its base"),
        ({"model-Q4_K_M.gguf": "GGUF"}, r"did you mean '.*model-Q4_K_M\.gguf' in it"),
        ({"config.json": "{}"}, "its config.json has no model_type"),
        ({"model.safetensors": ""}, "it has weights .* but no config.json"),
        ({}, "expected a folder with config.json"),
        ({"config.json": POINTER}, "config.json' is a Git LFS pointer"),
        ({"config.json": '{"model_type": null}'}, "its config.json has no model_type"),
        ({"config.json": json.dumps(LLAMA)}, "model.safetensors' is missing: copy the checkpoint again"),
        (
            {"config.json": json.dumps(LLAMA), "a.gguf": "GGUF"},
            r"cannot be read: it holds a GGUF file, give '.*a\.gguf' itself",
        ),
        ({"config.json": json.dumps(LLAMA), "adapter_model.bin": ""}, "is an adapter .* without its model"),
        (
            {"config.json": json.dumps(LLAMA), "model-00001-of-00002.safetensors": ""},
            "index.json' is missing, and there are shards",
        ),
        (
            {"config.json": json.dumps(LLAMA), "weights.00.safetensors": ""},
            r"model.safetensors' is missing, and weights.00.safetensors is not read",
        ),
        (
            {
                "config.json": json.dumps(LLAMA),
                "model.safetensors.index.json": '{"weight_map": {"w": "model-00001-of-00003.safetensors"}}',
            },
            "names 1 of 3 shards: copy the folder again",
        ),
    ],
)
def test_folders_that_are_no_checkpoints(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for reader in (open_checkpoint, open_model):
        with pytest.raises(UserError, match=message) as error:
            reader(tmp_path)
        assert "\n" not in str(error.value)


def test_paths_that_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("GGUF....")
    (tmp_path / "model.safetensors").write_text("x")
    (tmp_path / "pointer.safetensors").write_text(POINTER)
    for path, message in (
        (tmp_path / "model.gguf", "is not a GGUF file that can be read"),
        (tmp_path / "model.safetensors", "it is a file: give its folder"),
        (tmp_path / "pointer.safetensors", "is a Git LFS pointer"),
        ("meta-llama/Llama-2-7b-hf", "does not exist: check the path, or write hf-hub:meta-llama/Llama-2-7b-hf"),
    ):
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)


def models(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in "ab"]
    for seed, path in enumerate(paths):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(LLAMA))
        save_file({"w.weight": torch.full((4,), float(seed))}, path / "model.safetensors")
    return paths


def put(name: str, content: str = "{}") -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(content)


def config(**values: object) -> Callable[[Path], object]:
    return put("config.json", json.dumps(LLAMA | values))


def tensors(**values: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: save_file({k.replace("__", "."): v for k, v in values.items()}, path / "model.safetensors")


QUANTIZED = "is a quantized model .*: (mix|read) what it was quantized from"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((config(quantization_config={"quant_method": kind}), QUANTIZED) for kind in ("gptq", "awq", "fp8", "hqq")),
        (config(text_config={"quantization_config": {"quant_method": "bitsandbytes"}}), r"text_config\.quantization"),
        (config(quantization={"bits": 4, "group_size": 64}), QUANTIZED),
        (put("quantize_config.json"), QUANTIZED),
        (put("hf_quant_config.json"), QUANTIZED),
        (tensors(x__weight=torch.ones(4), x__weight_scale=torch.ones(1)), QUANTIZED),
        *(
            (tensors(**{name: torch.zeros(2, 2, dtype=torch.int16)}), QUANTIZED)
            for name in ("x.codebooks", "x.weight._data", "x.down_proj_blocks", "x.weight.tensor_impl.data")
        ),
        (tensors(x__qweight=torch.ones(4, dtype=torch.int32)), QUANTIZED),
        (put("adapter_config.json"), "has an adapter beside the model .*merge it into its base first"),
        (put("adapter_model.bin", "x"), "has an adapter beside the model"),
        (tensors(x__lora_A__weight=torch.ones(4)), "has an adapter's tensors in the model"),
        (put("tokenizer.model", POINTER), r"tokenizer\.model' is a Git LFS pointer"),
        (put("model.safetensors", POINTER), r"model\.safetensors' is a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_plain_model_is_refused(
    tmp_path: Path, change: Callable[[Path], object], message: str, place: int
) -> None:
    paths = models(tmp_path)
    change(paths[place])
    for rules in ([], [{"match": "*", "weights": [1, 0]}]):
        with pytest.raises(UserError, match=message) as error:
            mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out", rules=rules)
        assert "\n" not in str(error.value)
        assert str(paths[place]) in str(error.value)
    with pytest.raises(UserError, match=message):
        open_checkpoint(paths[place])
    assert not list(tmp_path.glob("*out*"))


def test_matrices_of_eight_bits_are_quantized_and_masks_are_not(tmp_path: Path) -> None:
    paths = models(tmp_path)
    for path in paths:
        tensors(mask=torch.ones(4, dtype=torch.uint8))(path)
    mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    for path in paths:
        tensors(x__weight=torch.ones(4, dtype=torch.int8))(path)
    with pytest.raises(
        UserError, match=r"'x\.weight' in .* is torch\.int8, a quantized model's: mix what it was quant"
    ):
        mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out8")


def test_packed_integers_are_not_taken_from_one_model(tmp_path: Path) -> None:
    """To take them from one model without their scales would be noise: no rule is advised for them."""
    a, b = models(tmp_path)
    for seed, path in enumerate((a, b)):
        save_file({"x.packed": torch.full((2, 2), seed, dtype=torch.int32)}, path / "model.safetensors")
    with pytest.raises(UserError, match="as the packed weights of quantized models do: mix what they were"):
        mix_checkpoints([a, b], [0.5, 0.5], tmp_path / "out")
    with pytest.raises(UserError, match=r"out: .* cannot be a folder"):
        import_checkpoint(open_model(a), str(a / "config.json" / "x"), overwrite=False)  # type: ignore[arg-type]


def test_a_pointer_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text(POINTER)
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        load_tokenizer(tmp_path / "tokenizer.model")
