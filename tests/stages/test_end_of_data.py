"""With a finite mixture, training stops on all ranks together when every source has been read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import Batch
from sphinx_pl.stages import Stage
from tests.conftest import tiny_model
from tests.stages.test_stage import ALL, OPTIM, trainer


class Keys(L.Callback):
    """Writes down the keys that were trained on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        with (self.folder / f"keys-{trainer.global_rank}.txt").open("a") as file:
            file.writelines(f"{key}\n" for key in batch.keys)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_sample_is_trained_on_once(processor: Processor, sample_data: Path, tmp_path: Path, ranks: int) -> None:
    # The documents have very different lengths, so that the ranks reach their ends in different
    # steps.
    texts = [json.dumps({"text": "word " * (3 + 40 * (i % 7 == 0))}) + "\n" for i in range(31)]
    (tmp_path / "text.jsonl").write_text("".join(texts))
    sources = {
        "real": {"kind": "image_text", "path": str(sample_data / "real/val-*.tar")},
        "text": {"kind": "text", "path": str(tmp_path / "text.jsonl")},
    }
    data = DataModule(
        processor, sources, {}, {"row_length": 96, "micro_batch_rows": 2}, mixing={"epochs": 1}, workers=2
    )
    stage = Stage(tiny_model(), "test", ALL, OPTIM, max_steps=10_000)
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    trainer(tmp_path, max_steps=10_000, callbacks=[Keys(tmp_path)], **(options if ranks == 2 else {})).fit(stage, data)
    counts = Counter(key for path in tmp_path.glob("keys-*.txt") for key in path.read_text().split("\n")[:-1])
    expected = {
        f"{name}/{stream.source.record(i).key}"
        for name, stream in data.planner().mixture.streams.items()
        for i in range(len(stream.source))
    }
    assert set(counts) == expected
    assert set(counts.values()) == {1}
    assert len(list(tmp_path.glob("keys-*.txt"))) == ranks
