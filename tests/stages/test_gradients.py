"""Norms of gradients: their values, and the memory of their computation."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from sphinx_pl.stages import gradients


def parameter(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> nn.Parameter:
    result = nn.Parameter(torch.zeros(shape, dtype=dtype))
    result.grad = torch.randn(shape).to(dtype) if grad else None
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_of_all_elements_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = {
        "decoder": [parameter(300, 70, dtype=dtype), parameter(50, dtype=dtype), parameter(9, dtype=dtype, grad=False)],
        "projections": [parameter(0, dtype=dtype), parameter(1000, dtype=dtype)],
        "clip": [nn.Parameter(torch.ones(3), requires_grad=False)],
        "qformer": [parameter(4, dtype=dtype, grad=False)],
    }
    norm, by_part = gradients.norms(parts)
    flat = {
        part: torch.cat([torch.zeros(1).double(), *(p.grad.double().flatten() for p in ps if p.grad is not None)])
        for part, ps in parts.items()
    }
    assert by_part == {part: pytest.approx(float(flat[part].norm()), rel=1e-5) for part in parts if part != "clip"}
    assert norm == pytest.approx(float(torch.cat(list(flat.values())).norm()), rel=1e-5)


def test_a_gradient_that_is_not_finite_makes_the_norm_so() -> None:
    parts = {"decoder": [parameter(5), parameter(7)], "projections": [parameter(3)]}
    assert parts["decoder"][1].grad is not None
    parts["decoder"][1].grad[2] = torch.inf
    norm, by_part = gradients.norms(parts)
    assert norm == by_part["decoder"] == float("inf")
    assert by_part["projections"] < float("inf")


def test_copies_of_gradients_exist_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a bf16 or offloaded gradient DeepSpeed returns a float32 copy on the device.

    Those of 13B take 52 GB together.
    """
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def copied(parameter: nn.Parameter) -> Tensor | None:
        nonlocal most
        assert parameter.grad is not None
        copy = parameter.grad.float()
        alive.append(weakref.ref(copy))
        most = max(most, sum(reference() is not None for reference in alive))
        return copy

    monkeypatch.setattr(gradients, "local_gradient", copied)
    gradients.norms({"decoder": [parameter(8, dtype=torch.bfloat16) for _ in range(20)]})
    assert len(alive) == 20
    assert most <= 2
