"""The compiled kernel and the array operations that it replaces give the same, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sphinx_pl.checkpoints.tensors import same_bits
from sphinx_pl.mixing import kernel
from sphinx_pl.mixing.kernel import BLOCK, KINDS, mix_stretch
from sphinx_pl.mixing.methods import combine_, round_once
from tests.mixing.conftest import finite_bits

COUNT = 5 * BLOCK + 13


def rows(dtype: torch.dtype, kind: str, models: int) -> Tensor:
    if kind == "bits":
        return torch.stack([finite_bits(dtype, seed, COUNT) for seed in range(models)])
    scale = {"normal": 0.02, "tiny": 1e-6}[kind]
    drawn = torch.randn(models, COUNT, generator=torch.Generator().manual_seed(0))
    return (drawn * scale).to(dtype)


def test_it_is_what_array_operations_give(subtests: pytest.Subtests) -> None:
    for out_dtype in KINDS:
        for dtype in KINDS:
            for kind in ("normal", "tiny", "bits"):
                for coefficients in (
                    [0.4, 0.6],
                    [1.0, 0.0],
                    [0.0, 1.0],
                    [0.5, 0.5],
                    [1.5, -0.5],
                    [0.0, 0.0],
                    [0.2, 0.3, 0.5],
                ):
                    with subtests.test(out_dtype=out_dtype, dtype=dtype, kind=kind, coefficients=coefficients):
                        raw = rows(dtype, kind, len(coefficients))
                        pairs = np.array([(0, 1)], dtype=np.int64)
                        squares, distances = np.zeros(len(raw)), np.zeros(1)
                        found = torch.empty(COUNT, dtype=out_dtype)
                        mix_stretch(raw, np.array(coefficients), pairs, found, squares, distances)
                        wide = raw.double()
                        expected = round_once(
                            combine_([*wide.clone()], coefficients), torch.empty(COUNT, dtype=out_dtype)
                        )
                        assert same_bits(found, expected)
                        assert squares.tolist() == pytest.approx(wide.square().sum(1).tolist())
                        assert distances[0] == pytest.approx(float((wide[0] - wide[1]).square().sum()))


def test_lengths_are_not_finite_where_a_value_is_not(subtests: pytest.Subtests) -> None:
    for dtype in KINDS:
        with subtests.test(dtype=dtype):
            for value in (float("nan"), float("inf"), -float("inf")):
                raw = torch.ones(2, COUNT, dtype=dtype)
                raw[1, 77] = value
                squares = np.zeros(2)
                mix_stretch(
                    raw,
                    np.array([0.5, 0.5]),
                    np.zeros((0, 2), np.int64),
                    torch.empty_like(raw[0]),
                    squares,
                    np.zeros(0),
                )
                assert squares[0] == COUNT
                assert not np.isfinite(squares[1])


def test_it_runs_where_no_folder_can_be_written(tmp_path: Path) -> None:
    """As from an installation of the administrator's, by someone without a home."""
    package = tmp_path / "kernel.py"
    package.write_bytes(Path(kernel.__file__).read_bytes())
    (tmp_path / "__pycache__").touch()  # in the place of the folder
    code = (
        "import torch, numpy as np, kernel; out = torch.empty(3); "
        "kernel.mix_stretch(torch.ones(2, 3), np.array([.25, .5]), np.zeros((0, 2), np.int64), out, np.zeros(2), "
        "np.zeros(0)); print(out.tolist())"
    )
    places = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | places, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "[0.75, 0.75, 0.75]\n", done.stderr
