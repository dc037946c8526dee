"""Exchanges Python values between ranks, on the host."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def of_all_ranks(value: T, world_size: int) -> list[T]:
    """Return this value of every rank. All ranks call it together."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def any_rank(value: bool, world_size: int) -> bool:
    """Return whether the value is true on any rank."""
    if world_size == 1:
        return value
    flag = torch.tensor(int(value), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
