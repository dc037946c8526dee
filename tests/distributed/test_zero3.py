"""Features of ZeRO-3: bf16 with float32 masters, offloading, frozen parts, and the memory of a
rank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
from tests.conftest import new_processor, tiny_model
from tests.distributed.handmade import Samples, fit_written
from tests.distributed.test_engines import SOME, weights
from tests.ranks import on_ranks

NOTHING_STAYS = {"stage3_param_persistence_threshold": 0}
ADAMW = {"kind": "adamw", "lr": 1e-3, "eps": 1e-6}


def micro_batches(processor: Processor, folder: Path) -> list[list[Batch]]:
    """Return four micro-batches for each of two ranks."""
    s = Samples(processor, folder)
    return [[s.batch(s.image(), s.text()) for _ in range(4)] for _ in range(2)]


@pytest.fixture
def of_ranks(processor: Processor, sample_data: Path) -> list[list[Batch]]:
    return micro_batches(processor, sample_data)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


class Buffers(L.Callback):
    """The dtypes of what the optimizer keeps, and whether it works on the weights themselves."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.shared = False

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        zero: Any = trainer.optimizers[0]
        tensors = [*zero.fp32_partitioned_groups_flat, *(v for s in zero.optimizer.state.values() for v in s.values())]
        flat = zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
        self.dtypes = {tensor.dtype for tensor in tensors if tensor.dim()}
        self.shared = all(a.data_ptr() == b.data_ptr() for a, b in flat)


def trained(
    strategy: Callable[[], Zero3],
    of_ranks: list[list[Batch]],
    processor: Processor,
    out: Path,
    resume: Path | None = None,
    **options: Any,
) -> tuple[Losses, Buffers]:
    """Return what the first of two ranks noted in four steps, or in the last two if they resume."""

    def fit() -> tuple[Losses, Buffers]:
        losses, buffers = Losses(), Buffers()
        batches = [batches[-2:] if resume else batches for batches in of_ranks]
        common: dict[str, Any] = {"optim": ADAMW} | options
        callbacks = [losses, buffers]
        fit_written(
            strategy(), batches, processor, out, parts=SOME, callbacks=callbacks, resume=resume, max_steps=4, **common
        )
        return losses, buffers

    first, _ = on_ranks(2, fit)
    return first


Precise = dict[str, tuple[Path, Losses, Buffers]]


@pytest.fixture(scope="module")
def precise(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Precise:
    """Return precision -> the folder of a run with masters, and what its first rank noted."""
    processor = new_processor(sample_data, tiny_model())
    runs = {}
    for precision in ("32-true", "bf16-true"):
        out = tmp_path_factory.mktemp("run")
        of_ranks = micro_batches(processor, sample_data)
        runs[precision] = out, *trained(Zero3, of_ranks, processor, out, precision=precision)
    return runs


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
    precise: Precise, processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path
) -> None:
    (_, exact, _), (straight, rounded, _) = precise["32-true"], precise["bf16-true"]
    assert rounded.values == pytest.approx(exact.values, rel=0.02)
    assert rounded.values != exact.values
    resume = straight / "step-00000002"
    resumed, _ = trained(Zero3, of_ranks, processor, tmp_path, resume, precision="bf16-true")
    assert resumed.values == rounded.values[2:]
    after = weights(tmp_path, 4)
    for name, value in weights(straight, 4).items():
        assert torch.equal(value, after[name]), name


@pytest.mark.timeout(180)
def test_without_masters_it_trains_nearly_as_well_and_resumes_bit_for_bit(
    precise: Precise, processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path
) -> None:
    def fit(name: str, resume: Path | None = None) -> tuple[Losses, Buffers]:
        options: dict[str, Any] = {"optim": ADAMW | {"moments": "bf16"}, "precision": "bf16-true"}
        strategy = functools.partial(Zero3, masters="bf16", reduce_dtype="bf16")
        return trained(strategy, of_ranks, processor, tmp_path / name, resume, **options)

    _, exact, buffers = precise["bf16-true"]
    assert (buffers.dtypes, buffers.shared) == ({torch.float32}, False)
    rounded, buffers = fit("lean")
    same = (buffers.dtypes, buffers.shared) == ({torch.bfloat16}, True)
    assert same, "the weights themselves, and moments of their size"
    assert rounded.values == pytest.approx(exact.values, rel=0.02)
    assert rounded.values != exact.values
    resumed, _ = fit("resumed", tmp_path / "lean/step-00000002")
    assert resumed.values == rounded.values[2:]
    straight, after = weights(tmp_path / "lean", 4), weights(tmp_path / "resumed", 4)
    for name, value in straight.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, after[name]), name


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
def test_offloading_changes_nothing(
    precise: Precise, processor: Processor, of_ranks: list[list[Batch]], tmp_path: Path
) -> None:
    def fit(name: str, resume: Path | None = None) -> Losses:
        strategy = functools.partial(Zero3, offload_optimizer="cpu", offload_parameters="cpu")
        return trained(strategy, of_ranks, processor, tmp_path / name, resume)[0]

    folder, plain, _ = precise["32-true"]
    offloaded = fit("cpu")
    assert offloaded.norms == pytest.approx(plain.norms, rel=1e-4)
    assert min(plain.norms) > 0.5, "nothing was clipped"
    one, two = weights(folder, 4), weights(tmp_path / "cpu", 4)
    for name, value in one.items():
        assert (value - two[name]).abs().max() < 1e-5, name
    fit("again", tmp_path / "cpu/step-00000002")
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
