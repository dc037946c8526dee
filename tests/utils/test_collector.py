from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from sphinx_pl.utils.collector import uncollected
from tests.conftest import REPOSITORY


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


def test_leaving_loses_nothing_that_was_said(tmp_path: Path) -> None:
    code = (
        "import logging, logging.handlers, sys\n"
        "from sphinx_pl.utils.collector import leave\n"
        f"file = logging.FileHandler({str(tmp_path / 'log')!r})\n"
        "logging.getLogger().addHandler(logging.handlers.MemoryHandler(100, target=file))\n"
        "logging.warning('logged')\n"
        "print('said', end='')\n"
        "print('complained', end='', file=sys.stderr)\n"
        "leave()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "said", "complained")
    assert (tmp_path / "log").read_text() == "logged\n"
