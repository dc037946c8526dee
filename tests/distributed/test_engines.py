"""Every engine trains as one process does, and resumes from the checkpoints of every other
engine.
"""

from __future__ import annotations

from collections.abc import Callable
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
from tests.conftest import new_processor, tiny_model
from tests.ranks import on_ranks
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
    keys: list[list[str]] = field(default_factory=list)
    """The keys of each step's samples."""


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen = Seen()
        self._keys: list[str] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        training = [p for p in pl_module.parameters() if p.requires_grad]
        whole = sum(whole_shape(p).numel() for p in training)
        self._keys += batch.keys
        self.seen.shares.add(sum(resident(p) for p in training) / whole)
        if batch.ends_step:
            self.seen.keys.append(self._keys)
            self._keys = []
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
    """Train to `steps` and leave checkpoints of step 3 and of the end in `out`.

    `others` are options of the optimizer.
    """
    torch.manual_seed(seed)
    # The eps is above the noise of gradients that are zero but for rounding (biases of keys), which
    # Adam would amplify.
    optim = {"lr": 0.05 if kind == "sgd" else 1e-3, "kind": kind, "weight_decay": 0.1, "eps": 1e-6} | others
    stage = Stage(tiny_model(), "test", parts, optim, max_steps=20, checkpointing=checkpointing)
    stage.resumed = resume is not None
    watch = Watch()
    lightning = trainer(
        out,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
        callbacks=[watch, ResumeCheckpoint(str(out), every_n_steps=3, keep=9)],
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


Shared = Callable[..., tuple[Path, list[Seen]]]


@pytest.fixture(scope="module")
def shared(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Return a function that gives the folder of a run, and the observations of its ranks.

    Several tests read the same run, which is trained once: to step 3 with SGD, to step 6 with
    AdamW.
    """
    processor = new_processor(sample_data, tiny_model())
    runs: dict[str, tuple[Path, list[Seen]]] = {}

    def trained(
        engine: str | None, ranks: int, kind: str = "adamw", accumulate: int = 1, parts: list[str] = SOME
    ) -> tuple[Path, list[Seen]]:
        key = repr((engine, ranks, kind, accumulate, parts))
        if key not in runs:
            out, steps = tmp_path_factory.mktemp("run"), 3 if kind == "sgd" else 6
            options: dict[str, Any] = {"kind": kind, "accumulate": accumulate, "parts": parts}
            runs[key] = out, run(engine, ranks, processor, sample_data, out, steps, **options)
        return runs[key]

    return trained


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder / f"step-{step:08d}")
    return {name: checkpoint.tensor(name).clone() for name in checkpoint}


def keys(ranks: list[Seen], steps: int = 6) -> list[str]:
    """Return the keys of the first steps on all ranks."""
    return sorted(key for rank in ranks for step in rank.keys[:steps] for key in step)


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
def test_two_ranks_end_with_the_weights_of_one(engine: str, case: str, shared: Shared) -> None:
    kind, accumulate, parts = CASES[case]
    one, [alone] = shared(None, 1, kind, parts=parts)
    two, both = shared(engine, 2, kind, accumulate, parts)
    check_same(weights(one, 3), weights(two, 3), new_weights(parts))
    # Clipped gradients hide a loss that is wrong by a factor, and so does Adam. These norms precede
    # both.
    assert min(step["train/grad_norm"] for step in alone.norms[:3]) > CLIP, "not every step is clipped"
    assert alone.clipped[:3] == pytest.approx([CLIP] * 3, rel=1e-4)
    assert set(alone.norms[0]) == {"train/grad_norm", *(f"train/grad_norm/{part}" for part in parts)}
    for rank in both:
        assert rank.norms[:3] == [pytest.approx(step, rel=1e-3) for step in alone.norms[:3]]
    # The share is rounded up to whole elements or rows.
    assert all(share == pytest.approx(1 if engine == "ddp" else 0.5, abs=0.01) for r in both for share in r.shares)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_the_same_ranks_go_on_bit_for_bit(
    engine: str, shared: Shared, processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    straight, _ = shared(engine, 2)
    # Another seed changes everything that is not restored, including frozen encoders.
    run(engine, 2, processor, sample_data, tmp_path, 6, resume=straight / "step-00000003", seed=1)
    resumed = weights(tmp_path, 6)
    for name, value in weights(straight, 6).items():
        assert torch.equal(value, resumed[name]), name


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
    shared: Shared,
    processor: Processor,
    sample_data: Path,
    tmp_path: Path,
) -> None:
    straight, alone = shared(None, 1)
    halted, first = shared(*before)
    # The resumed run has twice the micro-batches, which Lightning counts, and starts after an odd
    # number of steps.
    options: dict[str, Any] = {"resume": halted / "step-00000003", "seed": 1, "accumulate": 2}
    last = run(*after, processor, sample_data, tmp_path, 6, **options)
    assert sorted(keys(first, 3) + keys(last)) == keys(alone)
    check_same(weights(straight, 6), weights(tmp_path, 6), new_weights(SOME))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", ["ddp", "zero3 sharded", "fsdp2"])
@pytest.mark.parametrize("checkpointing", [pytest.param("selective", marks=pytest.mark.long), "full"])
def test_blocks_that_are_computed_again_change_nothing(
    engine: str, checkpointing: str, shared: Shared, processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    kept, _ = shared(engine, 2, "sgd", 4, ALL)
    options: dict[str, Any] = {"kind": "sgd", "accumulate": 4, "parts": ALL, "checkpointing": checkpointing}
    run(engine, 2, processor, sample_data, tmp_path, 3, **options)
    check_same(weights(kept, 3), weights(tmp_path, 3), new_weights(ALL))


@pytest.mark.timeout(180)
def test_fsdp2_keeps_float32_and_computes_in_bf16(
    shared: Shared, processor: Processor, sample_data: Path, tmp_path: Path
) -> None:
    ENGINES["fsdp2 bf16"] = Fsdp2
    (of_float32, _), (straight, _) = shared("fsdp2", 2), shared("fsdp2 bf16", 2)
    run("fsdp2 bf16", 2, processor, sample_data, tmp_path, 6, resume=straight / "step-00000003")
    start, exact, rounded, resumed = (
        new_weights(SOME),
        weights(of_float32, 6),
        weights(straight, 6),
        weights(tmp_path, 6),
    )
    for name, value in rounded.items():
        assert torch.equal(value, resumed[name]), name
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
