"""A Lightning, Hydra and DeepSpeed pipeline for multimodal language models of the SPHINX kind."""

import os
import sys
import time
from pathlib import Path

__version__ = "0.1.0"

SPINS_ALONE, SPINS_BESIDE = 3000, 300
"""How often a waiting OpenMP thread looks for work before it sleeps: on an idle machine, and beside
other programs.

docs/performance.md explains how both numbers are measured.
"""
LOOK_S = 0.05
"""How long the cores are observed before the choice, in seconds."""
IDLE = 0.75
"""The share of idle core time on a machine that a program has to itself."""


def cpu_times() -> tuple[int, int]:
    """The idle and all ticks of all cores since boot; (0, 0) if `/proc/stat` cannot be read."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)
    except (OSError, ValueError, IndexError):
        return 0, 0


def choose_spins() -> int:
    """Return how often waiting threads look for work.

    They look rarely if other programs need the cores.
    """
    idle, total = cpu_times()
    time.sleep(LOOK_S)
    idle_later, total_later = cpu_times()
    watched = total_later - total
    return SPINS_ALONE if watched and (idle_later - idle) / watched > IDLE else SPINS_BESIDE


# libgomp, which torch brings, reads the environment when torch is imported. So this must happen
# before.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.intersection(os.environ):
    os.environ["GOMP_SPINCOUNT"] = str(choose_spins())
