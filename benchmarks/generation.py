"""Tokens per second of cached decoding, beside transformers' `generate` of the same LLaMA in the same run.

    python -m benchmarks.generation
    python -m benchmarks.generation --width 2048 --layers 16 --batch 8 --device cuda --precision bf16

The weights are random and the same in both; both decode greedily and their tokens are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sphinx_pl.checkpoints.huggingface import huggingface_config
from sphinx_pl.checkpoints.llama import llama_entries
from sphinx_pl.checkpoints.tensors import TensorDict
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.models.sphinx import Sphinx


def theirs(model: Sphinx) -> Any:
    """transformers' model with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config.decoder
    values = {key: value for key, value in huggingface_config(config, "float32").items() if key != "architectures"}
    llama = LlamaForCausalLM(LlamaConfig(**values))
    decoder = {f"decoder.{name}": value for name, value in model.decoder.state_dict().items()}
    entries = llama_entries(TensorDict(decoder), config)
    llama.load_state_dict({name: e.make(decoder[e.name]) if e.make else decoder[e.name] for name, e in entries.items()})
    return llama.to(model.decoder.tok_embeddings.weight).eval()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"width": 512, "layers": 8, "heads": 8, "kv-heads": 8, "vocab": 32000}
    for name, default in {**sizes, "batch": 8, "prompt": 64, "new": 64, "repeats": 7, "threads": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    o = parser.parse_args(arguments)
    if o.threads:
        torch.set_num_threads(o.threads)
    device, dtype = torch.device(o.device), torch.bfloat16 if o.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    ffn = 8 * o.width // 3 // 64 * 64
    decoder = DecoderConfig(o.vocab, o.width, o.layers, o.heads, o.kv_heads, ffn, max_positions=o.prompt + o.new)
    model = Sphinx(SphinxConfig(decoder=decoder, vision=None)).to(device, dtype).eval()
    reference = theirs(model)
    ids = torch.randint(3, o.vocab, (o.batch, o.prompt), device=device)
    prompts = [Prompt(row) for row in ids.tolist()]
    config = GenerationConfig(max_new_tokens=o.new)

    def ours() -> list[list[int]]:
        return generate(model, prompts, config)

    def transformers() -> list[list[int]]:
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=o.new,
            min_new_tokens=o.new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        rows: list[list[int]] = out[:, o.prompt :].tolist()
        return rows

    runs: dict[str, Callable[[], list[list[int]]]] = {"here": ours, "transformers": transformers}
    tokens = {name: run() for name, run in runs.items()}
    # In turn, so that what slows the machine for a while slows both.
    times = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(o.repeats)]
    table = Table(
        "", "seconds", "tokens/s", title=f"{o.batch} rows, {o.prompt} + {o.new} tokens, {o.precision}, {device}"
    )
    for name in runs:
        median = statistics.median(each[name] for each in times)
        table.add_row(name, f"{median:.2f}", f"{o.batch * o.new / median:,.0f}")
    ratios = [each["transformers"] / each["here"] for each in times]
    same = sum(a == b for a, b in zip(*tokens.values(), strict=True))
    console = Console()
    console.print(table)
    console.print(
        f"{statistics.median(ratios):.2f} times as fast as transformers ({min(ratios):.2f} to {max(ratios):.2f} in "
        f"{o.repeats} pairs); {same} of {o.batch} rows have the same tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
