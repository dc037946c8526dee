"""Peak memory and time of importing a released decoder, beside a plain copy of the same bytes.

    python -m benchmarks.importing /tmp/importing                      # 13B, two shards; needs 52 GB of disk
    python -m benchmarks.importing /tmp/importing --layers 4

Random numbers in Meta's layout, with the sizes of a model in conf/model. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
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

from sphinx_pl.checkpoints.original import decoder_sizes, shipped_model
from sphinx_pl.checkpoints.output import TorchOutput, copies
from sphinx_pl.checkpoints.tensors import TensorDict, TensorInfo
from sphinx_pl.checkpoints.torch_shards import split
from sphinx_pl.checkpoints.writer import write_file
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.decoder import Decoder

MODEL = "sphinx_13b"
POOL = 200_000_000  # more than any tensor


def write_random(folder: Path, layers: int, shards: int, tokenizer: Path) -> int:
    """The largest tensor's bytes."""
    config = dataclasses.replace(SphinxConfig.from_dict(shipped_model(MODEL)).decoder, layers=layers)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
    pool = torch.randn(POOL).mul_(0.02).bfloat16()
    generator = random.Random(0)

    folder.mkdir(parents=True)
    for rank in range(shards):
        parts = {
            name: tuple(split(name, torch.empty(shape, device="meta"), shards)[rank].shape)
            for name, shape in shapes.items()
        }

        tensors = {}
        for name, shape in parts.items():
            size = torch.Size(shape).numel()
            start = generator.randrange(POOL - size)
            tensors[name] = pool[start : start + size].view(shape)
        reader, file = TensorDict(tensors), folder / f"consolidated.{rank:02d}.pth"
        write_file(file, TorchOutput(file.name, copies(reader)), reader)
    (folder / "params.json").write_text(json.dumps(decoder_sizes(config)))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return max(TensorInfo(shape, pool.dtype).nbytes for shape in shapes.values())


@dataclasses.dataclass(frozen=True)
class Run:
    """A command: bytes that it wrote, seconds until they were on the disk, peak resident memory in bytes."""

    written: int
    seconds: float
    peak: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """`largest`: bytes of the largest tensor."""

    largest: int
    copied: Run
    imported: Run


def timed(command: Sequence[str], out: Path) -> Run:
    """Of a command that writes the folder `out`."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone, unlike RUSAGE_CHILDREN
    if status:
        raise subprocess.CalledProcessError(status, command)
    os.sync()
    seconds = time.perf_counter() - start
    return Run(sum(file.stat().st_size for file in out.iterdir()), seconds, usage.ru_maxrss * 1024)


def measure(folder: Path, layers: int, shards: int, tokenizer: Path) -> Measured:
    """In `folder`, which is made and removed."""
    released, copy, out = (folder / name for name in ("released", "copy", "imported"))
    folder.mkdir(parents=True)
    try:
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as process:  # gives its memory back
            largest = process.submit(write_random, released, layers, shards, tokenizer).result()
        os.sync()
        copied = timed(["cp", "-r", str(released), str(copy)], copy)
        shutil.rmtree(copy)
        command = [sys.executable, "-m", "sphinx_pl.cli.checkpoint", "import", str(released), str(out)]
        return Measured(largest, copied, timed(command, out))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that does not exist, on the disk to measure")
    parser.add_argument("--layers", type=int, default=40, help="of the decoder (default: 40)")
    parser.add_argument("--shards", type=int, default=2, help="model-parallel files (default: 2)")
    parser.add_argument("--tokenizer", type=Path, default=Path("tests/golden/tokenizer.model"))
    o = parser.parse_args(arguments)
    if o.folder.exists():
        parser.error(f"{o.folder} exists")
    found = measure(o.folder, o.layers, o.shards, o.tokenizer)
    title = f"decoder of {MODEL}, {o.layers} layers, {o.shards} shards"
    table = Table("", "GB written", "seconds", "GB/s", "peak GB", title=title)
    for name, run in (("cp", found.copied), ("import", found.imported)):
        size = run.written / 1e9
        # A child's peak begins with what its parent had when it was started: of cp that is all.
        peak = f"{run.peak / 1e9:.2f}" if name == "import" else ""
        table.add_row(name, f"{size:.1f}", f"{run.seconds:.0f}", f"{size / run.seconds:.2f}", peak)
    ratio = (found.imported.seconds / found.imported.written) / (found.copied.seconds / found.copied.written)
    console = Console()
    console.print(table)
    console.print(f"largest tensor {found.largest / 1e9:.2f} GB; a byte costs {ratio:.2f} times as long as by cp")
    return 0


if __name__ == "__main__":
    sys.exit(main())
