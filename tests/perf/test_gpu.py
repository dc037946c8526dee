"""What trains at real shapes on a GPU is the same command without one."""

from __future__ import annotations

import pytest
import torch

from perf import gpu

SMALL = ["trainer=zero3_cpu", "trainer.devices=1", "data.packing.row_length=128", "stage.optim.lr=1e-3"]


@pytest.mark.long
def test_a_row_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    lean = [*gpu.LEAN, "trainer.precision=bf16-true"]
    assert gpu.main(["--models", "sphinx_sample", "--steps", "4", *SMALL, *lean]) == 0
    out = capsys.readouterr().out
    cells = next(line for line in out.splitlines() if "sphinx_sample" in line).strip("│ ").split("│")
    model, _, recomputed, positions, images, steps, seconds, tokens, mfu, peak, ratio, losses = map(str.strip, cells)
    assert (model, recomputed, positions, steps) == ("sphinx_sample", "full", "1 * 128", "4")
    assert int(images) >= 1
    assert float(tokens) == pytest.approx(128 / float(seconds), rel=0.05)
    assert 0 < float(mfu.rstrip("%")) < 100
    assert float(peak) > 0
    assert float(ratio) > 0
    first, last = map(float, losses.split(" to "))
    assert last < first, "the same batch again and again is learned"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) != 0
    error = capsys.readouterr().err
    assert "no GPU is here" in error
    assert "Traceback" not in error
