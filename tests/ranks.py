"""Runs several ranks on this machine, as a launcher would start them."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from sphinx_pl.models.sphinx import Sphinx
from tests.conftest import tiny_model

# The first backward pass decides whether autograd has threads, which no fork survives. It has none
# if it sees only CPUs.
torch.ones(1, requires_grad=True).backward()  # type: ignore[no-untyped-call]


@functools.cache
def import_for_forks() -> None:
    """Import the libraries that each fork would otherwise import for seconds: the encoders', and
    DeepSpeed's late imports.
    """
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    with torch.device("meta"):
        Sphinx(tiny_model())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def environment_of(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for a rank of one node."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return {key: str(value) for key, value in environment.items()}


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Return what `function(*args)` returns in each of `ranks` processes, which see themselves as
    torchrun's.

    The processes are forked, so that nothing is imported again. A rank that waits for the others
    for ever is an AssertionError.
    """
    import_for_forks()
    context = multiprocessing.get_context("fork")
    port = free_port()
    outcomes: Any = context.Queue()

    def run(rank: int) -> None:
        os.environ |= environment_of(rank, ranks, port)
        gc.freeze()  # else each collection looks through all that the parent holds
        # This replaces the parent's thread pool once. Otherwise each of autograd's threads would
        # try to, and race.
        torch.set_num_threads(1)
        try:
            outcomes.put((rank, True, function(*args)))
        except BaseException:
            outcomes.put((rank, False, traceback.format_exc()))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < ranks:
            try:
                rank, good, value = outcomes.get(timeout=1)
            except queue.Empty:
                assert time.monotonic() < deadline, f"ranks {sorted(set(range(ranks)) - set(results))} hang"
                dead = [r for r, p in enumerate(processes) if not p.is_alive() and r not in results]
                assert not dead or outcomes.qsize(), f"ranks {dead} died"
                continue
            assert good, f"rank {rank}:\n{value}"
            results[rank] = value
    finally:
        for process in processes:
            process.join(5 if len(results) == ranks else 0.1)
            process.kill()
            process.join()
    return [results[rank] for rank in range(ranks)]
