"""Makes mergekit.safetensors beside this file: small models, and what mergekit 0.1.5 makes of them.

    pip install mergekit==0.1.5      # in an environment of its own, whose Python then runs this:
    python tests/golden/make_mergekit.py

The models (`base`, and `a`, `b`, `c` near it) are LLaMAs under Hugging Face's names, float32 and seeded. Each merge is
one run of `mergekit-yaml` on folders of them. In the file a tensor is called `<model or merge>/<name>`; its metadata
have one entry, `settings`, which is JSON: `versions`, `config` (the models' config.json), `merges` (what each merge was
told, where a model is called by its name), `edges` (tensors that are unlike the others, and how). Every folder has
tests/golden/tokenizer.model, which no method reads.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
OUT = HERE / "mergekit.safetensors"
VOCAB, WIDTH, FFN, LAYERS, HEADS, KV_HEADS = 64, 16, 32, 2, 4, 2
DENSITY = 0.4

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

EQUAL = "model.layers.1.input_layernorm.weight"
NEAR = "model.layers.1.post_attention_layernorm.weight"
ZERO = "model.layers.1.self_attn.k_proj.weight"
FAR = "lm_head.weight"
EDGES = {
    EQUAL: "equal in all models",
    NEAR: "so near to the base that products of two offsets' norms are below 1e-6",
    ZERO: "0 in model a",
    FAR: "in model a without relation to the base",
}


def shapes() -> dict[str, tuple[int, ...]]:
    kv = WIDTH // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (WIDTH,),
                "self_attn.q_proj": (WIDTH, WIDTH),
                "self_attn.k_proj": (kv, WIDTH),
                "self_attn.v_proj": (kv, WIDTH),
                "self_attn.o_proj": (WIDTH, WIDTH),
                "post_attention_layernorm": (WIDTH,),
                "mlp.gate_proj": (FFN, WIDTH),
                "mlp.up_proj": (FFN, WIDTH),
                "mlp.down_proj": (WIDTH, FFN),
            }.items()
        }
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def normal(label: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(label.encode())))


def models() -> dict[str, dict[str, Tensor]]:
    """Offsets from the base are not independent, else model_stock would stay at the base."""
    made: dict[str, dict[str, Tensor]] = {name: {} for name in ("base", "a", "b", "c")}
    for name, shape in shapes().items():
        base = normal(f"base {name}", shape) * (0.1 if len(shape) == 1 else 0.3) + (1 if len(shape) == 1 else 0)
        shared = normal(f"shared {name}", shape)
        made["base"][name] = base
        for model in ("a", "b", "c"):
            offset = 0.05 * (shared + normal(f"{model} {name}", shape))
            made[model][name] = base + offset * {EQUAL: 0, NEAR: 1e-4}.get(name, 1)
    made["a"][ZERO].zero_()
    made["a"][FAR] = 0.3 * normal(f"far {FAR}", (VOCAB, WIDTH))
    return made


def check_no_ties(made: dict[str, dict[str, Tensor]]) -> None:
    """Which of equal magnitudes TIES keeps depends on how they are sorted: a result that it decides is no reference."""
    for model in ("a", "b", "c"):
        for name, tensor in made[model].items():
            offset = (tensor - made["base"][name]).abs().flatten().sort(descending=True).values
            kept = int(DENSITY * len(offset))
            if offset[kept - 1] == offset[kept] and offset[kept] != 0:
                raise SystemExit(f"{model}: {name} has equal magnitudes at the threshold: draw other numbers")


def merge(method: str, models: dict[str, dict[str, float]], base: str = "", **parameters: Any) -> dict[str, Any]:
    """mergekit's configuration; every model has parameters of its own, `parameters` are those of all."""
    settings: dict[str, Any] = {"merge_method": method, "dtype": "float32", "out_dtype": "float32"}
    if base:
        settings["base_model"] = base
    settings["models"] = [{"model": model, "parameters": own} for model, own in models.items()]
    return {**settings, "parameters": parameters}


def weights(**of: float) -> dict[str, dict[str, float]]:
    return {model: {"weight": weight} for model, weight in of.items()}


def sparse(**of: float) -> dict[str, dict[str, float]]:
    return {model: {"weight": weight, "density": DENSITY} for model, weight in of.items()}


MERGES = {
    "linear": merge("linear", weights(a=0.3, b=0.7)),
    "linear_normalized": merge("linear", weights(a=0.3, b=0.9), normalize=True),
    "linear_not_normalized": merge("linear", weights(a=0.3, b=0.9), normalize=False),
    "linear_of_3": merge("linear", weights(a=0.2, b=0.3, c=0.5), normalize=False),
    "slerp": merge("slerp", {"a": {}, "b": {}}, "a", t=0.4),
    "task_arithmetic": merge("task_arithmetic", weights(a=0.7, b=0.5), "base", normalize=False),
    "ties_normalized": merge("ties", sparse(a=1.0, b=0.6), "base", normalize=True),
    "ties_not_normalized": merge("ties", sparse(a=1.0, b=0.6), "base", normalize=False),
    "model_stock_of_2": merge("model_stock", {"a": {}, "b": {}}, "base"),
    "model_stock_of_3": merge("model_stock", {"a": {}, "b": {}, "c": {}}, "base"),
}


def run(settings: dict[str, Any], folders: Path, out: Path) -> dict[str, Tensor]:
    settings = copy.deepcopy(settings)
    for entry in settings["models"]:
        entry["model"] = str(folders / entry["model"])
    if "base_model" in settings:
        settings["base_model"] = str(folders / settings["base_model"])
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(settings))  # which is YAML as well
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(file), str(out)]
    subprocess.run([*command, "--quiet", "--no-write-model-card"], check=True)
    found: dict[str, Tensor] = load_file(out / "model.safetensors")
    if found.keys() != shapes().keys() or any(tensor.dtype != torch.float32 for tensor in found.values()):
        raise SystemExit(f"{out.name}: not the tensors, or not the dtype, that were asked for")
    return found


def main() -> None:
    made = models()
    check_no_ties(made)
    content = {f"{model}/{name}": tensor for model, tensors in made.items() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folders = Path(temporary)
        for model, tensors in made.items():
            (folders / model).mkdir()
            save_file(tensors, folders / model / "model.safetensors", {"format": "pt"})
            (folders / model / "config.json").write_text(json.dumps(CONFIG))
            shutil.copyfile(HERE / "tokenizer.model", folders / model / "tokenizer.model")
            # With it the tokenizer is copied; without it, it would be loaded.
            (folders / model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        for name, settings in MERGES.items():
            print(name, flush=True)
            merged = run(settings, folders, folders / f"out-{name}")
            content |= {f"{name}/{key}": tensor for key, tensor in merged.items()}
    versions = {package: importlib.metadata.version(package) for package in ("mergekit", "torch")}
    settings = {"versions": versions, "config": CONFIG, "merges": MERGES, "edges": EDGES}
    save_file(content, OUT, {"settings": json.dumps(settings)})
    print(f"{OUT.name}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
