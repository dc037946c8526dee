"""A Lightning, Hydra and DeepSpeed pipeline for multimodal language models of the SPHINX kind."""

import os
import sys
import time
from pathlib import Path

__version__ = "0.1.0"

SPINS_ALONE, SPINS_BESIDE = 3000, 300
"""How often a thread of OpenMP looks for work before it sleeps, on a machine with idle cores and beside other programs.

docs/performance.md says how both are measured.
"""
LOOK_S = 0.05
"""How long the cores are watched before the choice, in seconds."""
IDLE = 0.75
"""Share of the cores' time that is idle on a machine that a program has to itself."""


def cpu_times() -> tuple[int, int]:
    """Ticks of all cores since the machine started, idle and in all; (0, 0) where `/proc/stat` cannot be read."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)
    except (OSError, ValueError, IndexError):
        return 0, 0


def choose_spins() -> int:
    """How often waiting threads look for work here: rarely where other programs need the cores."""
    idle, total = cpu_times()
    time.sleep(LOOK_S)
    idle_later, total_later = cpu_times()
    watched = total_later - total
    return SPINS_ALONE if watched and (idle_later - idle) / watched > IDLE else SPINS_BESIDE


# libgomp, which torch brings, reads the environment when torch is imported: after this module, or it is too late.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.intersection(os.environ):
    os.environ["GOMP_SPINCOUNT"] = str(choose_spins())
