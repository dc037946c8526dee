"""Peak memory and time of importing a released checkpoint, beside a plain copy of the same bytes.

    python -m benchmarks.importing /tmp/importing                      # 13B, two shards: 27 GB in, 31 GB out
    python -m benchmarks.importing /tmp/importing --layers 4

Random numbers in the original's layout, as `sphinx_plus` has it: LLaMA-2 13B and two towers, whose matrices share one
storage in the files, so that they need little disk. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sphinx_pl.checkpoint.original import UNUSED, decoder_sizes, shipped_model, their_name
from sphinx_pl.checkpoint.parallel import split
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx

MODEL, KIND = "sphinx_plus", "llama_ens5_light"
TOWERS = ("llma.openclip_convnext_xxl.", "llma.dinov2_vitg14.")
POOL = 200_000_000  # more than any tensor


def write_random(folder: Path, layers: int, shards: int, tokenizer: Path) -> int:
    """The largest tensor's bytes. Holds one shard in memory."""
    config = SphinxConfig.from_dict(shipped_model(MODEL))
    config.decoder.layers = layers
    with torch.device("meta"):
        shapes = {their_name(name): tensor.shape for name, tensor in Sphinx(config).state_dict().items()}
    shapes |= {name: (1, 1, *shapes[name]) for name in ("llma.start_img", "llma.end_img")}
    shapes |= {name: torch.Size(shape) for name, shape in UNUSED.items() if "dinov2" in name}
    pool = torch.randn(POOL).mul_(0.02).bfloat16()

    def value(name: str, shape: Sequence[int], rank: int) -> Tensor:
        start = hash((name, rank)) % (POOL - torch.Size(shape).numel())
        shared = pool[start : start + torch.Size(shape).numel()].view(shape)
        return shared if name.startswith(TOWERS) else shared.clone()

    folder.mkdir(parents=True)
    for rank in range(shards):
        parts = {name: split(name, torch.empty(s, device="meta"), shards)[rank].shape for name, s in shapes.items()}
        content = {name: value(name, shape, rank) for name, shape in parts.items()}
        torch.save({"model": content}, folder / f"consolidated.{rank:02d}-of-{shards:02d}.model.pth")
    (folder / "config.json").write_text(json.dumps(decoder_sizes(config.decoder)))
    (folder / "meta.json").write_text(json.dumps({"llama_type": KIND}))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return max(torch.Size(shape).numel() * 2 for shape in shapes.values())


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def timed(command: Sequence[str]) -> tuple[float, int]:
    """Seconds until a command's bytes are on the disk, and its peak resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone, unlike RUSAGE_CHILDREN
    if status:
        raise subprocess.CalledProcessError(status, command)
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that does not exist, on the disk to measure")
    parser.add_argument("--layers", type=int, default=40, help="of the decoder (default: 40)")
    parser.add_argument("--shards", type=int, default=2, help="model-parallel files (default: 2)")
    parser.add_argument("--tokenizer", type=Path, default=Path("tests/golden/tokenizer.model"))
    o = parser.parse_args(arguments)
    if o.folder.exists():
        parser.error(f"{o.folder} exists")
    console = Console()
    released, copy, out = (o.folder / name for name in ("released", "copy", "imported"))
    try:
        console.print("Writing random numbers")
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as process:  # gives its memory back
            largest = process.submit(write_random, released, o.layers, o.shards, o.tokenizer).result()
        os.sync()
        table = Table(
            "", "GB written", "seconds", "GB/s", "peak GB", title=f"{MODEL}, {o.layers} layers, {o.shards} shards"
        )

        def measure(name: str, command: Sequence[str], written: Path) -> float:
            seconds, peak = timed(command)
            size = folder_bytes(written) / 1e9
            table.add_row(name, f"{size:.1f}", f"{seconds:.0f}", f"{size / seconds:.2f}", f"{peak / 1e9:.2f}")
            return seconds / size

        plain = measure("cp", ["cp", "-r", str(released), str(copy)], copy)
        shutil.rmtree(copy)
        ours = measure("import", [sys.executable, "-m", "sphinx_pl.checkpoint", "import", str(released), str(out)], out)
        console.print(table)
        console.print(f"largest tensor {largest / 1e9:.2f} GB; a byte costs {ours / plain:.2f} times as long as by cp")
    finally:
        shutil.rmtree(o.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
