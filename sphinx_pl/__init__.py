"""A Lightning, Hydra and DeepSpeed pipeline for multimodal language models of the SPHINX kind."""

import os

__version__ = "0.1.0"

SPINS = "300"
"""How often a thread of OpenMP looks for work before it sleeps. docs/performance.md says how to measure the choice."""

# libgomp, which torch brings, reads the environment when torch is imported: after this module.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.intersection(os.environ):
    os.environ["GOMP_SPINCOUNT"] = SPINS
