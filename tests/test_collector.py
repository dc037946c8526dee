from __future__ import annotations

import gc

import pytest

from sphinx_pl.collector import uncollected


def collections() -> int:
    return sum(int(generation["collections"]) for generation in gc.get_stats())


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_meanwhile_and_then_it_is_as_before(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with uncollected():
            before = collections()
            kept: list[list[int]] = [[] for _ in range(100_000)]
            assert collections() == before
        assert gc.isenabled() is enabled
        with pytest.raises(ImportError), uncollected():
            raise ImportError
        assert gc.isenabled() is enabled
        assert len(kept) == 100_000
    finally:
        gc.enable()


def test_as_many_objects_are_looked_through_otherwise() -> None:
    before = collections()
    kept: list[list[int]] = [[] for _ in range(100_000)]
    assert collections() > before
    assert len(kept) == 100_000
