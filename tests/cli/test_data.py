"""`sphinx-data`: the mixture's table and the search for duplicates, as a user runs
them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sphinx_pl.cli.data import main

MIXTURE = ("experiment=demo", "stage=finetune")


def test_the_table_of_a_mixture(sample_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", *MIXTURE, f"data.root={sample_data}", "probe=8", "ranks=2"]) == 0
    out = capsys.readouterr().out
    assert "1900 steps of 16 rows of 192 positions; shares by sample" in out
    for name, share in (("regions", "42.0%"), ("answers", "34.0%"), ("text", "5.0%")):
        [row] = [line for line in out.splitlines() if f" {name} " in line]
        assert share in row


def test_missing_files_are_shown_and_an_error_unless_they_may_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["table", *MIXTURE, f"data.root={tmp_path}"]
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out.count("MISSING") == 8
    assert "files are missing for text, answers, " in output.err
    assert "val_sources.tasks, tokenizer (source 'text': there is no file" in output.err
    assert output.err.count("\n") == 1
    assert main([*arguments, "missing=ok"]) == 0
    assert capsys.readouterr().out.count("MISSING") == 8


def test_duplicates_are_found_and_filtered(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d.npy"
    shards = f"{sample_data}/synthetic/train-*.tar"
    assert main(["duplicates", f"path={shards}", "by=caption", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: " in printed
    assert "pairs are duplicates by caption" in printed
    source = f"+data.sources.synthetic.filters={{duplicates: {out}}}"
    assert main(["table", "stage=pretrain_synthetic", f"data.root={sample_data}", "probe=500", source]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if " synthetic " in line]
    assert " 0.0% " not in row  # some are filtered


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel"], "unknown command 'tabel': did you mean 'table'"),
        (["table", "missing=maybe"], "missing=maybe must be error or ok"),
        (["table", "probe=0"], "probe=0"),
        (["table", "data.sources.text.weigth=1"], "weigth"),
        (["duplicates"], "path=SHARDS is needed"),
        (["duplicates", "path=nowhere-*.tar"], "there is no file 'nowhere-"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
