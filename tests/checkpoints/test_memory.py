"""Memory of importing a released decoder; and what DeepSpeed's converter makes of a checkpoint beside `consolidate`."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from perf.harness import TOKENIZER, Process, run_process
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.original import decoder_sizes, shipped_model
from sphinx_pl.checkpoints.output import Entry, TorchOutput
from sphinx_pl.checkpoints.tensors import TensorDict, TensorInfo, same_bits
from sphinx_pl.checkpoints.torch_shards import split
from sphinx_pl.checkpoints.training import consolidate
from sphinx_pl.checkpoints.writer import write_file
from sphinx_pl.distributed.checkpointing import PREFIX
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.decoder import Decoder
from tests.conftest import REPOSITORY

POOL = 200_000_000
"""Numbers of which tensors are made: more than the largest has."""


def import_13b(folder: Path, layers: int) -> tuple[int, Process]:
    """The largest tensor's bytes, and an import of LLaMA-2 13B with so many layers in two of Meta's files."""
    config = dataclasses.replace(SphinxConfig.from_dict(shipped_model("sphinx_13b")).decoder, layers=layers)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    pool, generator = torch.randn(POOL).mul_(0.02).bfloat16(), random.Random(0)
    released = folder / "released"
    released.mkdir(parents=True)
    for rank in range(2):
        meta = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
        infos = {n: TensorInfo(tuple(split(n, tensor, 2)[rank].shape), tensor.dtype) for n, tensor in meta.items()}

        def value(info: TensorInfo) -> Tensor:
            start = generator.randrange(POOL - info.numel)
            return pool[start : start + info.numel].view(info.shape)

        name = f"consolidated.{rank:02d}.pth"
        entries = {n: Entry(info, None, partial(value, info)) for n, info in infos.items()}
        write_file(released / name, TorchOutput(name, entries), TensorDict({}))
    (released / "params.json").write_text(json.dumps(decoder_sizes(config)))
    shutil.copyfile(TOKENIZER, released / "tokenizer.model")
    out = folder / "imported"
    command = [sys.executable, "-m", "sphinx_pl.cli.checkpoint", "import", str(released), str(out)]
    process = run_process(command, out)
    shutil.rmtree(folder)
    return max(2 * shape.numel() for shape in shapes.values()), process


@pytest.mark.long
def test_memory_of_an_import_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    (largest, small), (_, large) = (import_13b(tmp_path / str(layers), layers) for layers in (1, 8))
    for process in (small, large):
        assert 1e6 * process.peak < 2e9 + largest
    assert large.written > 3 * small.written > 3e9
    assert large.peak < small.peak + 300


RANK = """
import sys
from pathlib import Path
from typing import Any
import lightning as L
import torch
from torch.utils.data import DataLoader
from perf.harness import TOKENIZER
from perf.memory import random_batch, stage_and_trainer, untrained
from sphinx_pl.callbacks.checkpoint import write_training_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.planning.memory import Shape

folder = Path(sys.argv[1])

class Batches(L.LightningDataModule):
    def __init__(self, processor: Processor, batch: Any) -> None:
        super().__init__()
        self.processor, self.batch = processor, batch
    def train_dataloader(self) -> Any:
        return DataLoader([self.batch] * 10, batch_size=None, collate_fn=None)

class Write(L.Callback):
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        write_training_checkpoint(trainer, folder / "ours", None)
        trainer.strategy.deepspeed_engine.save_checkpoint(str(folder / "theirs"), tag="checkpoint")
        trainer.strategy.barrier()

overrides = ["model=sphinx_sample", "trainer=zero3_cpu", "trainer.precision=bf16-true", "trainer.devices=2"]
overrides += ["stage.optim.warmup=0", "stage.optim.lr=1e-3", "data.packing.row_length=128"]
overrides += ["++trainer.strategy.zero.reduce_bucket_size=2000000"]
cfg = untrained([*overrides, "stage.train_parts=[decoder,projections]"], folder, 1)
torch.manual_seed(0)
stage, trainer = stage_and_trainer(cfg, [Write()])
model = SphinxConfig.from_dict(cfg.model)
batch = random_batch(model, Shape(rows=1, length=128, supervised=32, images=1))
trainer.fit(stage, Batches(Processor.from_dict({}, TOKENIZER, model), batch))
"""
CONVERT = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
convert(sys.argv[1], sys.argv[2], safe_serialization=True)
"""


def run(*command: str) -> None:
    environment: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.long
def test_a_model_of_a_zero3_checkpoint_is_that_of_deepspeeds_converter(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run(*launcher, str(tmp_path / "rank.py"), str(tmp_path))
    run("-c", CONVERT, str(tmp_path / "theirs"), str(tmp_path / "converted"))
    for dtype in (torch.float32, torch.bfloat16):
        consolidate(tmp_path / "ours", tmp_path / str(dtype), dtype)
    model, half = (open_checkpoint(tmp_path / str(dtype)) for dtype in (torch.float32, torch.bfloat16))
    theirs: dict[str, Tensor] = {}
    for file in (tmp_path / "converted").glob("*.safetensors"):
        theirs |= {name.removeprefix(PREFIX): value for name, value in load_file(file).items()}
    assert set(model) == theirs.keys()
    for name, value in theirs.items():
        assert same_bits(model.tensor(name), value), name
        assert same_bits(half.tensor(name), value.bfloat16()), name
