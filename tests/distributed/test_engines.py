"""Every engine trains as one process does, and resumes from the checkpoints of every other
engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sphinx_pl.callbacks.checkpoint import ResumeCheckpoint
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import Batch
from sphinx_pl.distributed.fsdp2 import Fsdp2
from sphinx_pl.distributed.zero import Zero3
from sphinx_pl.models.sphinx import whole_shape
from sphinx_pl.runtime.ranks import join
from sphinx_pl.stages import Stage, gradients
from tests.conftest import tiny_model
from tests.ranks import on_ranks
from tests.stages.test_end_of_data import Keys
from tests.stages.test_stage import ALL, trainer

SOME = ["decoder", "projections"]
ROWS = 8  # of an optimizer step, on all ranks and in all micro-batches together
CLIP = 0.5
ENGINES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "zero3": Zero3,
    "zero3 sharded": lambda: Zero3(frozen="sharded", zero={"stage3_param_persistence_threshold": 0}),
    "zero3 offloaded": lambda: Zero3(offload_optimizer="cpu", offload_parameters="cpu"),
    "fsdp2": lambda: Fsdp2(compute_dtype="fp32"),
    "fsdp2 sharded": lambda: Fsdp2(compute_dtype="fp32", frozen="sharded"),
}


def resident(parameter: Any) -> int:
    """Return the number of elements that this process holds between two micro-batches."""
    if hasattr(parameter, "ds_id"):  # small parameters may stay gathered
        return parameter.ds_tensor.numel() + (0 if parameter.ds_persist else parameter.numel())
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


@dataclass
class Seen:
    """The observations of one rank."""

    norms: list[dict[str, float]] = field(default_factory=list)
    """The gradient norms of each step before clipping: of all parameters, and of each part."""
    clipped: list[float] = field(default_factory=list)
    """The norm of all gradients that the optimizer got. (ZeRO-3 has dropped them by then.)"""
    rates: list[tuple[float, float]] = field(default_factory=list)
    """The learning rate of each step, and its weight decay."""
    shares: set[float] = field(default_factory=set)
    """The share of the training parameters that the rank held after each micro-batch."""


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen = Seen()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        training = [p for p in pl_module.parameters() if p.requires_grad]
        whole = sum(whole_shape(p).numel() for p in training)
        self.seen.shares.add(sum(resident(p) for p in training) / whole)
        if batch.ends_step:
            if not hasattr(training[0], "ds_id"):
                self.seen.clipped.append(gradients.norms(pl_module.sphinx.part_parameters())[0])
            decay = trainer.optimizers[0].param_groups[0]["weight_decay"]
            self.seen.rates.append((float(trainer.callback_metrics["train/lr"]), decay))
            items = trainer.callback_metrics.items()
            self.seen.norms.append({k: float(v) for k, v in items if k.startswith("train/grad_norm")})


def data(processor: Processor, folder: Path, rows: int, partitions: int | None = 4) -> DataModule:
    sources = {
        "real": {"kind": "image_text", "path": str(folder / "real/train-*.tar")},
        "text": {"kind": "text", "path": str(folder / "text/train.jsonl"), "weight": 2.0},
    }
    return DataModule(
        processor,
        sources,
        {},
        {"row_length": 96, "micro_batch_rows": rows},
        mixing={"partitions": partitions},
        workers=0,
    )


def fit(
    engine: str | None,
    ranks: int,
    processor: Processor,
    folder: Path,
    out: Path,
    steps: int,
    *,
    resume: Path | None = None,
    parts: list[str] = SOME,
    kind: str = "adamw",
    accumulate: int = 1,
    checkpointing: str = "none",
    seed: int = 0,
    **others: float,
) -> Seen:
    """Train to `steps` and leave a checkpoint in `out`. `others` are options of the optimizer."""
    torch.manual_seed(seed)
    # The eps is above the noise of gradients that are zero but for rounding (biases of keys), which
    # Adam would amplify.
    optim = {"lr": 0.05 if kind == "sgd" else 1e-3, "kind": kind, "weight_decay": 0.1, "eps": 1e-6} | others
    stage = Stage(tiny_model(), "test", parts, optim, max_steps=20, checkpointing=checkpointing)
    stage.resumed = resume is not None
    keys = out / f"keys-{steps}"
    keys.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    lightning = trainer(
        out,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
        callbacks=[Keys(keys), watch, ResumeCheckpoint(str(out), keep=9)],
        use_distributed_sampler=False,
        **({"strategy": ENGINES[engine](), "devices": ranks} if engine else {}),
    )
    join(lightning)  # as train.py does, before Lightning does it again
    lightning.fit(stage, data(processor, folder, ROWS // ranks // accumulate), ckpt_path=resume, weights_only=True)
    return watch.seen


def run(engine: str | None, ranks: int, *args: Any, **options: Any) -> list[Seen]:
    if engine is None:
        return [fit(None, 1, *args, **options)]
    return on_ranks(ranks, lambda: fit(engine, ranks, *args, **options))


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder / f"step-{step:08d}")
    return {name: checkpoint.tensor(name).clone() for name in checkpoint}


def keys(folder: Path) -> list[str]:
    return sorted(key for path in folder.iterdir() for key in path.read_text().split("\n")[:-1])


def new_weights(parts: list[str]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    stage = Stage(tiny_model(), "test", parts, {}, max_steps=1)
    stage.configure_model()
    return stage.sphinx.state_dict()


def check_same(one: dict[str, Tensor], two: dict[str, Tensor], start: dict[str, Tensor], share: float = 1e-3) -> None:
    """Check that the changes made by training differ by at most this share."""
    assert one.keys() == two.keys() == start.keys()
    moved = 0.0
    for name, value in start.items():
        change = float((one[name] - value).norm())
        moved = max(moved, change)
        assert float((one[name] - two[name]).norm()) <= share * change + 1e-6, name
    assert moved > 1e-2


CASES: dict[str, tuple[str, int, list[str]]] = {
    "sgd, four micro-batches": ("sgd", 4, ALL),
    "adamw, frozen encoders": ("adamw", 1, SOME),
    "sgd": ("sgd", 1, ALL),
    "adamw, four micro-batches, frozen encoders": ("adamw", 4, SOME),
}
QUICK = {engine: list(CASES)[: 1 if " " in engine else 2] for engine in ENGINES}
"""The other cases are long. Variants of an engine only take the first case."""


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("engine", "case"),
    [
        pytest.param(engine, case, marks=() if case in QUICK[engine] else pytest.mark.long)
        for engine in ENGINES
        for case in CASES
    ],
)
def test_two_ranks_end_with_the_weights_of_one(
    engine: str, case: str, processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    kind, accumulate, parts = CASES[case]
    options: dict[str, Any] = {"kind": kind, "parts": parts}
    [alone] = run(None, 1, processor, sample_data, tmp_path / "one", 3, **options)
    both = run(engine, 2, processor, sample_data, tmp_path / "two", 3, accumulate=accumulate, **options)
    check_same(weights(tmp_path / "one", 3), weights(tmp_path / "two", 3), new_weights(parts))
    # Clipped gradients hide a loss that is wrong by a factor, and so does Adam. These norms precede
    # both.
    assert min(step["train/grad_norm"] for step in alone.norms) > CLIP, "not every step is clipped"
    assert alone.clipped == pytest.approx([CLIP] * 3, rel=1e-4)
    assert set(alone.norms[0]) == {"train/grad_norm", *(f"train/grad_norm/{part}" for part in parts)}
    for rank in both:
        assert rank.norms == [pytest.approx(step, rel=1e-3) for step in alone.norms]
    # The share is rounded up to whole elements or rows.
    assert all(share == pytest.approx(1 if engine == "ddp" else 0.5, abs=0.01) for r in both for share in r.shares)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_the_same_ranks_go_on_bit_for_bit(engine: str, processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    run(engine, 2, processor, sample_data, tmp_path / "straight", 6)
    run(engine, 2, processor, sample_data, tmp_path / "halted", 3)
    # Another seed changes everything that is not restored, including frozen encoders.
    resume = tmp_path / "halted/step-00000003"
    run(engine, 2, processor, sample_data, tmp_path / "halted", 6, resume=resume, seed=1)
    straight, halted = weights(tmp_path / "straight", 6), weights(tmp_path / "halted", 6)
    for name, value in straight.items():
        assert torch.equal(value, halted[name]), name


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("engine", "ranks"),
    [(None, 1), *(pytest.param(engine, 2, marks=pytest.mark.long) for engine in ("zero3", "fsdp2"))],
)
def test_a_resumed_run_uses_its_own_learning_rates(
    engine: str | None, ranks: int, processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    """A lower rate is the way out of a diverged run."""
    options = {"lr": 1e-4, "min_lr": 1e-5, "weight_decay": 0.01}
    [straight, *_] = run(engine, ranks, processor, sample_data, tmp_path / "straight", 4, **options)
    run(engine, ranks, processor, sample_data, tmp_path / "halted", 2)
    resume = tmp_path / "halted/step-00000002"
    [halted, *_] = run(engine, ranks, processor, sample_data, tmp_path / "halted", 4, resume=resume, **options)
    assert halted.rates == straight.rates[2:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("zero3", 2), (None, 1)),
        ((None, 1), ("zero3", 2)),
        pytest.param(("zero3", 4), ("zero3", 2), marks=pytest.mark.long),
        pytest.param(("zero3", 2), ("fsdp2", 4), marks=pytest.mark.long),
        pytest.param(("fsdp2", 2), ("zero3", 1), marks=pytest.mark.long),
        (("ddp", 2), ("fsdp2", 2)),
    ],
    ids=str,
)
def test_other_ranks_and_engines_resume(
    before: tuple[str | None, int],
    after: tuple[str | None, int],
    processor: Processor,
    sample_data: Path,
    tmp_path: Path,
) -> None:
    run(None, 1, processor, sample_data, tmp_path / "straight", 6)
    run(*before, processor, sample_data, tmp_path / "halted", 3)
    resume = tmp_path / "halted/step-00000003"
    # The resumed run has twice the micro-batches, which Lightning counts, and starts after an odd
    # number of steps.
    run(*after, processor, sample_data, tmp_path / "halted", 6, resume=resume, seed=1, accumulate=2)
    used_keys = keys(tmp_path / "halted/keys-3") + keys(tmp_path / "halted/keys-6")
    assert sorted(used_keys) == keys(tmp_path / "straight/keys-6")
    check_same(weights(tmp_path / "straight", 6), weights(tmp_path / "halted", 6), new_weights(SOME))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", ["ddp", "zero3 sharded", "fsdp2"])
@pytest.mark.parametrize("checkpointing", [pytest.param("selective", marks=pytest.mark.long), "full"])
def test_blocks_that_are_computed_again_change_nothing(
    engine: str, checkpointing: str, processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    for name, how in (("kept", "none"), ("again", checkpointing)):
        run(engine, 2, processor, sample_data, tmp_path / name, 2, checkpointing=how, kind="sgd", parts=ALL)
    check_same(weights(tmp_path / "kept", 2), weights(tmp_path / "again", 2), new_weights(ALL))


@pytest.mark.timeout(180)
def test_fsdp2_keeps_float32_and_computes_in_bf16(processor: Processor, sample_data: Path, tmp_path: Path) -> None:
    ENGINES["fsdp2 bf16"] = Fsdp2
    for name, engine in (("exact", "fsdp2"), ("rounded", "fsdp2 bf16"), ("halted", "fsdp2 bf16")):
        run(engine, 2, processor, sample_data, tmp_path / name, 3 if name == "halted" else 6)
    run("fsdp2 bf16", 2, processor, sample_data, tmp_path / "halted", 6, resume=tmp_path / "halted/step-00000003")
    start, exact, rounded = new_weights(SOME), weights(tmp_path / "exact", 6), weights(tmp_path / "rounded", 6)
    halted = weights(tmp_path / "halted", 6)
    for name, value in rounded.items():
        assert torch.equal(value, halted[name]), name
        if name.startswith("mixer.towers"):  # frozen, whole on every rank
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, start[name].bfloat16()), name
        else:
            assert value.dtype == torch.float32
            assert not torch.equal(value, exact[name]), name
            # AdamW takes steps of the size of the learning rate, whatever the gradient, and most
            # have the same direction.
            a, b = (exact[name] - start[name]).flatten(), (value - start[name]).flatten()
            assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.8, name
