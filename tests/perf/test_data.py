from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from perf import data
from perf.synthetic_files import Words, train_tokenizer
from sphinx_pl.data.readers import line_index


def test_every_kind_of_source_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("webdataset")
    assert data.main(["speed", "--images=12", "--rounds=1", "--seconds=0.02", f"--folder={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    for name in ("pairs (tar)", "chats (jsonl)", "questions (json list)", "text (jsonl)", "text (parquet)"):
        assert name in printed


def test_only_the_first_block_is_opened_at_the_start(tmp_path: Path) -> None:
    cases, tokenizer_file = data.make_cases(tmp_path, shards=100, per_shard=40, lines=2000)
    result = data.start(cases[0].source, tokenizer_file)
    assert result.shards == 8
    for case in cases[1:]:
        assert data.start(case.source, tokenizer_file).shards == 1


def shared_index(path: str) -> tuple[float, float]:
    """MB of an index' mapping that are this process' own and shared with others, all of it touched."""
    table, _ = line_index.index_entries(path)
    int(table.sum())
    counted: Counter[str] = Counter()
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            name = line
        elif "/spans/" in name and key.startswith(("Private_", "Shared_")):
            counted[key.partition("_")[0]] += int(rest[0])
    return counted["Private"] / 1000, counted["Shared"] / 1000


def test_an_index_is_shared_between_processes(tmp_path: Path) -> None:
    path = data.write_many(tmp_path / "many.jsonl", 100_000, as_list=False)
    index, _ = line_index.index_entries(str(path))
    assert len(index) == 100_000
    assert int(index.sum()) > 0  # all of it is mapped here
    own, shared = data.in_new_process(shared_index, str(path))
    assert own < 0.1 < 1.5 < shared


@pytest.mark.parametrize(("as_list", "name"), [(True, "a.json"), (False, "a.jsonl")])
def test_many_entries_are_what_they_say(tmp_path: Path, as_list: bool, name: str) -> None:
    index, problem = line_index.index_entries(str(data.write_many(tmp_path / name, 2500, as_list)))
    assert not problem
    assert len(index) == 2500


def test_memory_of_a_worker_is_flat(tmp_path: Path) -> None:
    first, last = data.memory_over(tmp_path, (200, 1200))
    assert last.samples >= 1200 > first.samples >= 200
    assert last.worker - first.worker < 40  # what it has once all is loaded; docs/performance.md has the full run


def test_an_unknown_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["sped"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_made_words_have_the_tokens_of_a_language(tmp_path: Path) -> None:
    import random

    from sphinx_pl.data.tokenizers import load_tokenizer

    words = Words()
    tokenizer = load_tokenizer(train_tokenizer(words, tmp_path / "tokenizer.model"))
    assert 1.1 < len(tokenizer.encode(words.text(random.Random(0), 1000))) / 1000 < 1.7
