from __future__ import annotations

from pathlib import Path

import pytest

from perf import packing
from sphinx_pl.data.sampling import collator as real


@pytest.fixture(autouse=True)
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(real, "load_image", refuse)


def test_both_mixtures_are_at_least_95_percent_useful_and_padding_is_not(sample_data: Path) -> None:
    cases = [*packing.sample_cases(sample_data, 8), *packing.simulated_cases(8)]
    tight = {("sample, finetune", 192), ("paper, pretraining", 2048)}  # what no packer could fill: docs/performance.md
    for case in cases:
        result = packing.packed(case, steps=12, partitions=1)
        fits = (case.name, case.packing.row_length) not in tight
        assert result.useful >= (0.95 if fits else 0.88), case.name
        by_length = packing.padded(case, 12, by_length=True)
        assert packing.padded(case, 12, by_length=False) < by_length < result.useful
        assert not result.without


def test_the_slowest_rank_has_at_most_5_percent_more_work() -> None:
    for case in packing.simulated_cases(8):
        result = packing.packed(case, steps=8, partitions=8)
        assert result.slowest < 0.05
        assert result.worst < 0.05


def test_the_table_is_printed(sample_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert packing.main([f"--root={sample_data}", "--steps=2", "--partitions", "1", "2"]) == 0
    printed = capsys.readouterr().out
    for name in ("sample, pretrain_real", "sample, finetune", *packing.SIMULATED):
        assert name in printed
