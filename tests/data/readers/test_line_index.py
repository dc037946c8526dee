"""Where entries lie is found without parsing them, whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphinx_pl.data.readers import line_index
from sphinx_pl.data.readers.line_index import EntryIndex, index_entries

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab\\"[]{},: \n\té😀', max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def contents(path: Path, result: EntryIndex) -> list[object]:
    data = path.read_bytes()
    return [json.loads(data[offset : offset + size]) for offset, size in result.tolist()]


@pytest.fixture(params=[1, 7, 64, 1 << 24])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in pieces: what is cut by their edges must not matter."""
    monkeypatch.setattr(line_index, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
def test_lists_of_anything(tmp_path: Path) -> None:
    number = iter(range(1 << 20))

    @given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.data())
    @settings(max_examples=60, deadline=None)
    def check(items: list[object], indent: int | None, ascii_only: bool, data: st.DataObject) -> None:
        path = tmp_path / f"{next(number)}.json"
        path.write_text(f" \n{json.dumps(items, indent=indent, ensure_ascii=ascii_only)}\n")
        result, problem = index_entries(str(path))
        assert problem == ""
        assert contents(path, result) == items
        # Cut anywhere, the entries before the cut stay.
        text = path.read_bytes()
        cut = tmp_path / f"{next(number)}.json"
        cut.write_bytes(text[: data.draw(st.integers(3, len(text) - 2))])
        result, problem = index_entries(str(cut))
        assert problem == "shard_truncated"
        assert contents(cut, result) == items[: len(result)]

    check()


@pytest.mark.usefixtures("chunk")
def test_lines_that_are_not_blank(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    mark = b"\xef\xbb\xbf"
    long = b" " * 100 + b"\t\n"
    path.write_bytes(mark + b'\n{"a": 1}\r\n  \n' + long + b'\t\r\n 7\n"last, without an end"')
    result, problem = index_entries(str(path))
    assert problem == ""
    assert contents(path, result) == [{"a": 1}, 7, "last, without an end"]


@pytest.mark.parametrize(
    ("text", "count", "problem"),
    [
        ("", 0, ""),
        ("[]", 0, ""),
        ("[ \n ]", 0, ""),
        ("\ufeff[1, 2]\r\n", 2, ""),
        ("\ufeff", 0, ""),
        ("[", 0, "shard_truncated"),
        ("[1", 0, "shard_truncated"),
        ("[1] [2, 3", 1, "text_after_list"),
        ("[1]\n[2]\n", 1, "text_after_list"),
        ("[] x", 0, "text_after_list"),
    ],
)
def test_small_files(tmp_path: Path, text: str, count: int, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    result, told = index_entries(str(path))
    assert (len(result), told) == (count, problem)


def test_the_index_is_mapped_from_the_cache_and_follows_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    index_entries(str(path))
    monkeypatch.setattr(line_index, "_index_list", lambda path: pytest.fail("read again"))
    result, _ = index_entries(str(path))
    assert type(result).__name__ == "memmap"
    assert contents(path, result) == [1, 2]
    monkeypatch.undo()
    path.write_text("[1, 2, 3]")
    assert contents(path, index_entries(str(path))[0]) == [1, 2, 3]
