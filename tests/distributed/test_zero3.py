"""Features of ZeRO-3: bf16 with float32 masters, offloading, frozen parts, and the memory of a
rank.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from sphinx_pl.callbacks.checkpoint import write_training_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import Batch
from sphinx_pl.distributed.zero import Zero3
from sphinx_pl.models.sphinx import whole_shape
from sphinx_pl.utils.errors import UserError
from tests.distributed.handmade import Samples, fit_written
from tests.distributed.test_engines import SOME, weights
from tests.ranks import on_ranks

NOTHING_STAYS = {"stage3_param_persistence_threshold": 0}
ADAMW = {"kind": "adamw", "lr": 1e-3, "eps": 1e-6}


@pytest.fixture
def of_ranks(processor: Processor, sample_data: Path) -> list[list[Batch]]:
    """Return four micro-batches for each of two ranks."""
    s = Samples(processor, sample_data)
    return [[s.batch(s.image(), s.text()) for _ in range(4)] for _ in range(2)]


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


@pytest.mark.timeout(180)
def test_masters_are_float32_and_begin_with_the_values_that_were_read(
    processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path
) -> None:
    def begin() -> list[tuple[torch.dtype, torch.dtype]]:
        _, run = fit_written(
            Zero3(),
            of_ranks,
            processor,
            tmp_path / "bf16",
            parts=SOME,
            precision="bf16-true",
            max_steps=0,
            init_from=start,
        )
        write_training_checkpoint(run, tmp_path / "bf16/step-00000000", None)
        strategy: Any = run.strategy
        return [
            (p.ds_tensor.dtype, strategy.local_weight(p).dtype)
            for p in strategy._sphinx.parameters()
            if p.requires_grad
        ]

    fit_written(None, of_ranks[:1], processor, tmp_path / "start", parts=SOME)
    start = tmp_path / "start/step-00000004"
    dtypes = on_ranks(2, begin)
    assert set(dtypes[0] + dtypes[1]) == {(torch.bfloat16, torch.float32)}
    read, kept = weights(tmp_path / "start", 4), weights(tmp_path / "bf16", 0)
    rounded = 0
    for name, value in read.items():
        if ".towers." in name:  # frozen ones have no masters
            assert torch.equal(kept[name], value.bfloat16()), name
        else:
            assert torch.equal(kept[name], value), name
            rounded += int(not torch.equal(value, value.bfloat16().float()))
    assert rounded, "all values are bf16 numbers: nothing is tested"


@pytest.mark.timeout(180)
def test_bf16_trains_as_float32_does_and_resumes_bit_for_bit(
    processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path
) -> None:
    def fit(name: str, precision: str, steps: int, resume: Path | None = None) -> list[float]:
        losses = Losses()
        batches = [batches[-steps:] if resume else batches for batches in of_ranks]
        options: dict[str, Any] = {"resume": resume, "max_steps": 4 if resume else steps, "precision": precision}
        fit_written(
            Zero3(), batches, processor, tmp_path / name, parts=SOME, optim=ADAMW, callbacks=[losses], **options
        )
        return losses.values

    exact, rounded = on_ranks(2, fit, "fp32", "32-true", 4)[0], on_ranks(2, fit, "bf16", "bf16-true", 4)[0]
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
    on_ranks(2, fit, "halted", "bf16-true", 2)
    resumed = on_ranks(2, fit, "halted", "bf16-true", 2, tmp_path / "halted/step-00000002")[0]
    assert resumed == rounded[2:]
    straight, halted = weights(tmp_path / "bf16", 4), weights(tmp_path / "halted", 4)
    for name, value in straight.items():
        assert torch.equal(value, halted[name]), name


@pytest.mark.timeout(180)
def test_without_masters_it_trains_nearly_as_well_and_resumes_bit_for_bit(
    processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path
) -> None:
    lean = {"optim": ADAMW | {"moments": "bf16"}}

    def fit(name: str, masters: bool, steps: int, resume: Path | None = None) -> tuple[list[float], set[Any], bool]:
        losses = Losses()
        batches = [batches[-steps:] if resume else batches for batches in of_ranks]
        options: dict[str, Any] = {"resume": resume, "max_steps": 4 if resume else steps, "precision": "bf16-true"}
        options |= {"optim": ADAMW} if masters else lean
        engine = Zero3() if masters else Zero3(masters="bf16", reduce_dtype="bf16")
        _, run = fit_written(engine, batches, processor, tmp_path / name, parts=SOME, callbacks=[losses], **options)
        strategy: Any = run.strategy
        zero = strategy.optimizers[0]
        tensors = [*zero.fp32_partitioned_groups_flat, *(v for s in zero.optimizer.state.values() for v in s.values())]
        flat = zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
        shared = all(a.data_ptr() == b.data_ptr() for a, b in flat)
        return losses.values, {tensor.dtype for tensor in tensors if tensor.dim()}, shared

    exact, dtypes, shared = on_ranks(2, fit, "masters", True, 4)[0]
    assert (dtypes, shared) == ({torch.float32}, False)
    rounded, dtypes, shared = on_ranks(2, fit, "lean", False, 4)[0]
    assert (dtypes, shared) == ({torch.bfloat16}, True), "the weights themselves, and moments of their size"
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
    on_ranks(2, fit, "halted", False, 2)
    resumed, *_ = on_ranks(2, fit, "halted", False, 2, tmp_path / "halted/step-00000002")[0]
    assert resumed == rounded[2:]
    straight, halted = weights(tmp_path / "lean", 4), weights(tmp_path / "halted", 4)
    for name, value in straight.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, halted[name]), name


def test_options_without_masters_are_named(processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"masters=fp8 must be"):
        Zero3(masters="fp8")
    with pytest.raises(UserError, match=r"reduce_dtype=bf16"):
        Zero3(masters="bf16")
    with pytest.raises(UserError, match=r"no trainer\.strategy\.offload_optimizer"):
        Zero3(masters="bf16", reduce_dtype="bf16", offload_optimizer="cpu")
    options: dict[str, Any] = {"parts": SOME, "optim": ADAMW, "precision": "bf16-true"}

    def fit() -> None:
        engine = Zero3(masters="bf16", reduce_dtype="bf16")
        fit_written(engine, of_ranks[:1], processor, tmp_path, **options)

    with pytest.raises(AssertionError, match=r"UserError: .*set stage\.optim\.moments=bf16"):
        on_ranks(1, fit)


class Scaled(L.Callback):
    """Records the loss that was trained on, whose targets have weights, unlike the logged loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.timeout(120)
def test_weights_of_targets_are_not_rounded_to_bf16(
    processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path
) -> None:
    """A loss is the mean over targets, so all weights may be divided by three. bf16 represents a
    third to 0.2 %.
    """

    def fit(name: str, weight: float) -> float:
        weighed = [
            [dataclasses.replace(batch, weights=(batch.weights > 0) * weight) for batch in batches[:1]]
            for batches in of_ranks
        ]
        scaled = Scaled()
        fit_written(Zero3(), weighed, processor, tmp_path / name, parts=SOME, precision="bf16-true", callbacks=[scaled])
        [loss] = scaled.losses
        return loss

    third = 1 / 3
    assert abs(float(torch.tensor(third).bfloat16()) / third - 1) > 1e-3
    for one, other in zip(on_ranks(2, fit, "one", 1.0), on_ranks(2, fit, "third", third), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.timeout(240)
def test_offloading_changes_nothing(processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path) -> None:
    def fit(name: str, device: str | None, resume: Path | None = None) -> list[float]:
        losses = Losses()
        batches = [batches[-2:] if resume else batches for batches in of_ranks]
        strategy = Zero3(offload_optimizer=device, offload_parameters=device)
        fit_written(
            strategy,
            batches,
            processor,
            tmp_path / name,
            parts=SOME,
            optim=ADAMW,
            callbacks=[losses],
            resume=resume,
            max_steps=4,
        )
        return losses.norms

    plain, offloaded = on_ranks(2, fit, "plain", None)[0], on_ranks(2, fit, "cpu", "cpu")[0]
    assert offloaded == pytest.approx(plain, rel=1e-4)
    assert min(plain) > 0.5, "nothing was clipped"
    one, two = weights(tmp_path / "plain", 4), weights(tmp_path / "cpu", 4)
    for name, value in one.items():
        assert (value - two[name]).abs().max() < 1e-5, name
    on_ranks(2, fit, "again", "cpu", tmp_path / "cpu/step-00000002")
    resumed = weights(tmp_path / "again", 4)
    for name, value in two.items():
        assert torch.equal(value, resumed[name]), name


class Gathered(L.Callback):
    """How often frozen parameters were gathered in each step, and how many are gathered after
    it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, int]] = []
        self._now: list[Any] = []
        name = "_PartitionedParameterCoordinator__all_gather_params_"
        original: Any = getattr(PartitionedParameterCoordinator, name)

        def counted(coordinator: Any, params: Any, *args: Any, **options: Any) -> Any:
            self._now += list(params)
            return original(coordinator, params, *args, **options)

        monkeypatch.setattr(PartitionedParameterCoordinator, name, counted)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        frozen: list[Any] = [p for p in pl_module.parameters() if not p.requires_grad]
        available = sum(p.ds_status == ZeroParamStatus.AVAILABLE for p in frozen)
        self.steps.append((sum(not p.requires_grad for p in self._now), available))
        self._now = []


@pytest.mark.timeout(120)
def test_frozen_parts_are_gathered_once_or_each_time_and_cost_no_states(
    processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(frozen: str) -> tuple[list[tuple[int, int]], int]:
        gathered = Gathered(monkeypatch)
        strategy = Zero3(frozen=frozen, zero=NOTHING_STAYS)
        stage, _ = fit_written(
            strategy, of_ranks, processor, tmp_path / frozen, parts=SOME, optim=ADAMW, callbacks=[gathered]
        )
        parameters: list[Any] = list(stage.sphinx.parameters())
        assert all(p.grad is None for p in parameters if not p.requires_grad)
        zero: Any = strategy.optimizers[0]
        share = {p: -(-whole_shape(p).numel() // 2) for p in parameters}
        states = [values for state in zero.optimizer.state.values() for values in state.values() if values.dim()]
        held = {
            "weights": sum(p.ds_tensor.numel() for p in parameters),
            "masters": sum(buffer.numel() for buffer in zero.fp32_partitioned_groups_flat),
            "moments": sum(values.numel() for values in states),
            "gradients": zero.grad_partitions_flat_buffer.numel(),
        }
        trained = sum(n for p, n in share.items() if p.requires_grad)
        whole = sum(share.values())
        assert held == {"weights": whole, "masters": trained, "moments": 2 * trained, "gradients": trained}
        return gathered.steps, sum(not p.requires_grad for p in parameters)

    steps, count = on_ranks(2, fit, "whole")[0]
    assert [there for _, there in steps[1:]] == [count] * 3
    assert [gathers for gathers, _ in steps[2:]] == [0, 0]
    steps, count = on_ranks(2, fit, "sharded")[0]
    assert [there for _, there in steps] == [0] * 4
    assert all(gathers >= count for gathers, _ in steps[1:])
