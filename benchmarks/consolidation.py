"""Time and peak memory of making a model of a ZeRO-3 checkpoint, beside DeepSpeed's own converter and a plain copy.

    python -m benchmarks.consolidation /tmp/consolidation               # 0.5 * 10^9 parameters; needs 22 GB of disk
    python -m benchmarks.consolidation /tmp/consolidation --parameters 5e6 --rounds 1

Two CPU ranks train a model with new weights for one step (bf16, float32 masters, AdamW; a large decoder behind the
sample model's towers, which are frozen) and write our training checkpoint and DeepSpeed's of the same engine. Then, in
turns and each in a process of its own, both become a model in safetensors. What is read was read just before, so it
comes from the page cache, for all alike. That both models have the same float32 values is checked. The folder is
removed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from benchmarks.data import status
from benchmarks.memory import configuration, random_batch, stage_and_trainer
from sphinx_pl.callbacks.checkpoint import write_training_checkpoint
from sphinx_pl.checkpoints.folder import check_room, sync
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.tensors import SafetensorsFile, compare, same_bits
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import Batch
from sphinx_pl.distributed.checkpointing import PREFIX
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.planning.memory import Shape
from sphinx_pl.runtime.hydra_app import report
from sphinx_pl.utils.errors import UserError

RANKS = 2
VOCAB_SIZE = 32_000
SHAPE = Shape(rows=1, length=128, supervised=32, images=1)
TRAINING, DEEPSPEED, WRITING = "training", "deepspeed", "writing.json"
"""In the folder: both checkpoints, and the seconds that each took to be written."""

CONVERT = """
import sys, time
from pathlib import Path
{imports}
source, out, found = sys.argv[1:]
before, start = Path("/proc/self/status").read_text(), time.perf_counter()
{call}
Path(found).write_text(str(time.perf_counter() - start) + "\\n" + before)
"""
OURS = CONVERT.format(
    imports="import torch\nfrom sphinx_pl.checkpoints.training import consolidate",
    call="consolidate(Path(source), Path(out), torch.{dtype})",
)
THEIRS = CONVERT.format(
    imports="from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert",
    call="convert(source, out, safe_serialization=True)",
)


# -- the checkpoints -------------------------------------------------------------------------------------------------


def decoder_of(parameters: float) -> DecoderConfig:
    """LLaMA's proportions with about so many parameters; the embeddings alone have 4 * 10^6 and more."""

    def ffn(width: int) -> int:
        return 64 * round(width * 8 / 3 / 64)

    def layer(width: int) -> int:
        return width * (4 * width + 3 * ffn(width))

    def embeddings(width: int) -> int:
        return 2 * VOCAB_SIZE * width

    width = 64
    while embeddings(width + 64) + (1 + width // 64) * layer(width + 64) <= parameters:
        width += 64
    layers = max(1, round((parameters - embeddings(width)) / layer(width)))
    heads = width // 64
    return DecoderConfig(VOCAB_SIZE, width, layers, heads, heads, ffn(width), max_positions=2048)


class _Batches(L.LightningDataModule):
    """What a training checkpoint asks of a data module, and random batches."""

    def __init__(self, processor: Processor, batch: Batch) -> None:
        super().__init__()
        self.processor = processor
        self.batch = batch

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch] * 10, batch_size=None, collate_fn=None)  # type: ignore[arg-type]


class _Write(L.Callback):
    """Both checkpoints, when the step is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        begin = time.perf_counter()
        write_training_checkpoint(trainer, self.folder / TRAINING, None)
        ours = time.perf_counter()
        strategy.deepspeed_engine.save_checkpoint(str(self.folder / DEEPSPEED), tag="checkpoint")  # as Lightning's does
        strategy.barrier()
        seconds = {TRAINING: ours - begin, DEEPSPEED: time.perf_counter() - ours}
        if trainer.is_global_zero:
            (self.folder / WRITING).write_text(json.dumps(seconds))


def train(folder: Path, parameters: float, tokenizer: Path) -> None:
    """On this rank: one step, then both checkpoints."""
    config = decoder_of(parameters)
    overrides = ["model=sphinx_sample", "trainer=zero3_cpu", "trainer.precision=bf16-true", f"trainer.devices={RANKS}"]
    overrides += ["++trainer.strategy.zero.reduce_bucket_size=20000000"]  # memory only: not in what is written
    overrides += [f"++model.decoder.{key}={value}" for key, value in vars(config).items() if key != "load"]
    overrides += ["stage.optim.warmup=0", "stage.optim.lr=1e-3"]
    cfg = configuration([*overrides, f"data.packing.row_length={SHAPE.length}"], folder, steps=1)
    torch.manual_seed(0)
    stage, trainer = stage_and_trainer(cfg, [_Write(folder)])
    model = SphinxConfig.from_dict(cfg.model)
    trainer.fit(stage, _Batches(Processor.from_dict({}, tokenizer, model), random_batch(model, SHAPE)))


def write_checkpoints(folder: Path, parameters: float, tokenizer: Path) -> dict[str, float]:
    """Both, in `folder`; the seconds that each took."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "benchmarks.consolidation", str(folder), f"--parameters={parameters}"]
    command += [f"--tokenizer={tokenizer}", "--rank"]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.partition("failed (exitcode")[0]  # what the launcher says after it is of no help
        raise UserError(f"a rank failed: {said.strip()[-2000:]}")
    seconds: dict[str, float] = json.loads((folder / WRITING).read_text())
    return seconds


# -- models of them --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A process that wrote a folder: bytes, seconds, MB of memory.

    `call` is the conversion alone, `process` all from the start of the process; both until the bytes are on the disk,
    `returned` until the call came back; of a command that does not say, until it ended, and the other two are alike.
    `peak` is resident memory, mapped pages of files included, `anonymous` that without them, `start` what imports alone
    had taken.
    """

    written: int
    returned: float
    call: float
    process: float
    peak: float
    anonymous: float
    start: float


def run(command: Sequence[str], out: Path, found: Path) -> Run:
    """Raises: UserError: it failed."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    begin = time.perf_counter()
    peak = anonymous = 0.0
    log = found.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None:
            with contextlib.suppress(StopIteration, OSError):  # it has just ended
                peak = max(peak, status("VmHWM", process.pid))
                anonymous = max(anonymous, status("RssAnon", process.pid))
            time.sleep(0.01)
    ended = time.perf_counter()
    if process.returncode:
        raise UserError(f"{' '.join(command[:3])[:80]} failed: {log.read_text().strip()[-2000:]}")
    files = [path for path in out.rglob("*") if path.is_file()]
    sync(*files, out)
    seconds, flushed = time.perf_counter() - begin, time.perf_counter() - ended
    written = sum(file.stat().st_size for file in files)
    if not found.exists():
        return Run(written, ended - begin, seconds, seconds, peak, anonymous, 0.0)
    returned, _, before = found.read_text().partition("\n")
    found.unlink()
    start = next(int(line.split()[1]) for line in before.splitlines() if line.startswith("VmHWM:")) / 1000
    return Run(written, float(returned), float(returned) + flushed, seconds, peak, anonymous, start)


def warm(folder: Path) -> None:
    """Read all of its files, so that they are in the page cache if there is room."""
    block = bytearray(2**24)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def check(ours: Path, half: Path, theirs: Path) -> int:
    """How many tensors there are.

    Args:
        ours, half: our model in float32 and in bfloat16.
        theirs: DeepSpeed's.

    Raises:
        UserError: a tensor is not in both, or not the same in every bit; or bfloat16 is not float32 rounded.
    """
    a, b = open_checkpoint(ours), open_checkpoint(half)
    files = [SafetensorsFile(path) for path in sorted(theirs.glob("*.safetensors"))]
    names = {key.removeprefix(PREFIX): (file, key) for file in files for key in file.keys}
    theirs_shapes = {name: file.info(key).shape for name, (file, key) in names.items()}
    if problem := compare(theirs_shapes, {name: a.info(name).shape for name in a}):
        raise UserError(f"'{ours}' and '{theirs}' differ: {problem}")
    for name, (file, key) in names.items():
        value = a.tensor(name)
        if not same_bits(value, file.tensor(key)):
            raise UserError(f"'{name}' is not the same in '{ours}' and '{theirs}'")
        if not same_bits(value.bfloat16(), b.tensor(name)):
            raise UserError(f"'{name}' in '{half}' is not that in '{ours}', rounded")
    return len(names)


def measure(folder: Path, rounds: int) -> tuple[dict[str, list[Run]], int]:
    """Runs by what they are, and how many tensors were found to be the same."""
    outs = {name: folder / f"out-{name}" for name in ("float32", "deepspeed", "bfloat16", "copy")}
    converter = [sys.executable, "-c"]
    commands: dict[str, tuple[Path, list[str]]] = {
        "ours, float32": (outs["float32"], [*converter, OURS.format(dtype="float32"), str(folder / TRAINING)]),
        "DeepSpeed, float32": (outs["deepspeed"], [*converter, THEIRS, str(folder / DEEPSPEED)]),
        "ours, bfloat16": (outs["bfloat16"], [*converter, OURS.format(dtype="bfloat16"), str(folder / TRAINING)]),
        "cp of ours, float32": (outs["copy"], ["cp", "-r", str(outs["float32"])]),
    }
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, (out, command) in commands.items():
            warm(Path(command[-1]))
            result = folder / "found"
            command = [*command, str(out), *([] if command[0] == "cp" else [str(result)])]
            found[name].append(run(command, out, result))
    return found, check(outs["float32"], outs["bfloat16"], outs["deepspeed"])


def results(found: dict[str, list[Run]], title: str) -> Table:
    """Medians over the rounds, with the range of the seconds that count."""
    table = Table(title=title)
    columns = ("", "GB", "returns after s", "on the disk after s", "with imports s", "peak MB", "of it anonymous")
    for column in (*columns, "imports MB", "time / DeepSpeed's", "memory / DeepSpeed's"):
        table.add_column(column, justify="right")

    def middle(runs: list[Run], key: str) -> float:
        return statistics.median(getattr(run, key) for run in runs)

    theirs = found["DeepSpeed, float32"]
    for name, runs in found.items():
        low, high = min(run.call for run in runs), max(run.call for run in runs)
        copied = name.startswith("cp")
        table.add_row(
            name,
            f"{runs[0].written / 1e9:.2f}",
            "" if copied else f"{middle(runs, 'returned'):.2f}",
            f"{middle(runs, 'call'):.2f} ({low:.2f}–{high:.2f})",
            "" if copied else f"{middle(runs, 'process'):.2f}",
            f"{middle(runs, 'peak'):,.0f}",
            f"{middle(runs, 'anonymous'):,.0f}",
            "" if copied else f"{middle(runs, 'start'):,.0f}",
            f"{middle(runs, 'call') / middle(theirs, 'call'):.2f}",
            f"{middle(runs, 'peak') / middle(theirs, 'peak'):.3f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that does not exist, on the disk to measure")
    parser.add_argument("--parameters", type=float, default=5e8, help="about so many (default: 5e8)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each converter (default: 3)")
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    parser.add_argument("--tokenizer", type=Path, default=Path("tests/golden/tokenizer.model"))
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    if o.rank:
        train(o.folder, o.parameters, o.tokenizer)
        return 0
    if o.folder.exists():
        parser.error(f"{o.folder} exists")
    console = Console()
    try:
        check_room(o.folder, int(44 * o.parameters))  # 12 bytes ours, 14 DeepSpeed's, 14 of models and a copy
        o.folder.mkdir(parents=True)
        seconds = write_checkpoints(o.folder, o.parameters, o.tokenizer)
        shapes = open_checkpoint(o.folder / TRAINING)
        count = sum(shapes.info(name).numel for name in shapes)
        found, same = measure(o.folder, o.rounds)
    except UserError as error:
        return report(error)
    finally:
        if not o.keep:
            shutil.rmtree(o.folder, ignore_errors=True)
    console.print(results(found, f"{count / 1e6:,.0f} * 10^6 parameters, {RANKS} ranks, medians of {o.rounds}"))
    console.print(f"all {same} tensors: the same float32 values in both, bit for bit; bfloat16 is float32 rounded")
    console.print(
        f"written in {seconds[TRAINING]:.1f} s (ours) and {seconds[DEEPSPEED]:.1f} s (DeepSpeed's, not synced)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
