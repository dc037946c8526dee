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
def test_collection_pauses_and_is_then_restored(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with uncollected():
            before = collections()
            objects: list[list[int]] = [[] for _ in range(100_000)]
            assert collections() == before
        assert gc.isenabled() is enabled
        with pytest.raises(ImportError), uncollected():
            raise ImportError
        assert gc.isenabled() is enabled
        assert len(objects) == 100_000
    finally:
        gc.enable()


def test_as_many_objects_cause_collections_otherwise() -> None:
    before = collections()
    objects: list[list[int]] = [[] for _ in range(100_000)]
    assert collections() > before
    assert len(objects) == 100_000


def test_leaving_flushes_output_and_logs(tmp_path: Path) -> None:
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
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert (process.returncode, process.stdout, process.stderr) == (0, "said", "complained")
    assert (tmp_path / "log").read_text() == "logged\n"
