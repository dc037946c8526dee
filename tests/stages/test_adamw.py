"""AdamW with bf16 moments: what rounding loses, and what stochastic rounding keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sphinx_pl.stages.adamw import CHUNK, AdamWBf16, round_stochastically
from sphinx_pl.stages.optim import OptimConfig, build_optimizer
from sphinx_pl.utils.errors import UserError

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_a_rounded_value_is_a_neighbour_and_right_in_the_mean() -> None:
    values = torch.tensor([1.001, -1.001, 3.14159, 1e-30, -2e20, 0.0, 1.0]).repeat_interleave(20_000)
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically(values, out, torch.Generator().manual_seed(0))
    unit = torch.finfo(torch.bfloat16).eps * values.abs().log2().floor().exp2()  # 0 of 0
    assert bool(((out.float() - values).abs() <= unit).all())
    means = out.view(7, -1).double().mean(1).float()
    torch.testing.assert_close(means, values.view(7, -1)[:, 0], rtol=5e-5, atol=0)
    assert torch.equal(out.view(7, -1)[5:].unique(), torch.tensor([0.0, 1.0], dtype=torch.bfloat16)), "already bf16"


def test_numbers_that_are_not_finite_stay_so() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(1000)
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically(values, out, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.float(), values, equal_nan=True)


def train(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    for _ in range(steps):
        # The weights wander around a slope, so both moments matter.
        weight.grad = (weight.detach().float() - 3 + torch.randn(weight.shape)).to(weight.dtype)
        optimizer.step()
    return weight.detach().float().clone()


def test_float32_weights_end_where_torch_s_adamw_leads() -> None:
    start = torch.randn(64, 65)
    ends = []
    for kind in (torch.optim.AdamW, AdamWBf16):
        weight = nn.Parameter(start.clone())
        ends.append(train(weight, kind([weight], **OPTIONS), 200))  # type: ignore[arg-type]
    moved = (ends[0] - start).norm()
    assert float((ends[1] - ends[0]).norm() / moved) < 5e-3
    assert abs(float((ends[1] - ends[0]).mean() / (ends[0] - start).abs().mean())) < 5e-4, "off in one direction"


def test_the_first_step_is_torch_s_but_for_the_rounded_moments() -> None:
    start = torch.randn(1000)
    ends = []
    for kind in (torch.optim.AdamW, AdamWBf16):
        weight = nn.Parameter(start.clone())
        ends.append(train(weight, kind([weight], **OPTIONS), 1))  # type: ignore[arg-type]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


def test_bf16_weights_take_steps_that_are_small_beside_them() -> None:
    ends = {}
    for kind in (torch.optim.AdamW, AdamWBf16):
        weight = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
        # a hundredth of a unit of the last bit
        optimizer = kind([weight], lr=1e-4, weight_decay=0.0)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends[kind] = float(weight.detach().float().mean())
    assert ends[torch.optim.AdamW] == 1.0, "torch's loses all of them"
    assert ends[AdamWBf16] == pytest.approx(0.99, abs=3e-4)


def test_a_resumed_run_equals_the_uninterrupted_run() -> None:
    weight = nn.Parameter(torch.randn(50, 7))
    optimizer = AdamWBf16([weight], **OPTIONS)  # type: ignore[arg-type]
    train(weight, optimizer, 3)
    other = nn.Parameter(weight.detach().clone())
    resumed = AdamWBf16([other], **OPTIONS)  # type: ignore[arg-type]
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state[other]["exp_avg"].dtype == torch.bfloat16
    torch.rand(100)
    assert torch.equal(train(weight, optimizer, 3, seed=1), train(other, resumed, 3, seed=1))


def test_chunks_change_nothing_but_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for chunk in (CHUNK, 100):
        monkeypatch.setattr("sphinx_pl.stages.adamw.CHUNK", chunk)
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(1050))
        ends.append(train(weight, AdamWBf16([weight], **OPTIONS), 1))  # type: ignore[arg-type]
    assert torch.equal(*ends)


def test_the_configuration_chooses_it() -> None:
    parts = {"decoder": [nn.Parameter(torch.ones(2, 2))]}
    assert isinstance(build_optimizer(parts, OptimConfig(moments="bf16")), AdamWBf16)
    assert isinstance(build_optimizer(parts, OptimConfig()), torch.optim.AdamW)
    with pytest.raises(UserError, match=r"stage\.optim\.moments=fp8"):
        OptimConfig(moments="fp8")
    with pytest.raises(UserError, match="sgd has no moments"):
        OptimConfig(kind="sgd", moments="bf16")
