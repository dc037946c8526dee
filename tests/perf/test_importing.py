from __future__ import annotations

from pathlib import Path

import pytest

from perf.importing import measure

TOKENIZER = Path(__file__).parent.parent / "golden" / "tokenizer.model"


@pytest.mark.long
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    small, large = (measure(tmp_path / str(layers), layers, 2, TOKENIZER) for layers in (1, 8))
    for run in (small, large):
        assert run.imported.peak < 2e9 + run.largest
    assert large.imported.written > 3 * small.imported.written > 3e9
    assert large.imported.peak < small.imported.peak + 0.3e9
