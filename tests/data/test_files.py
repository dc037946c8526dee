"""Files from elsewhere: fetched whole, kept, fetched again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from sphinx_pl.data import files
from sphinx_pl.data.files import Hold, cache_folder, local_file
from sphinx_pl.data.images import load_image
from sphinx_pl.data.readers import ImageTextReader, InstructionReader, TextReader, build_reader
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHINX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "FIRST_WAIT", 0.0)


def answers(kind: str, path: str | list[str], **options: Any) -> list[str]:
    source = build_reader(kind, "x", path, **options)
    return [source.record(index).answer for index in range(len(source))]


def test_text_in_every_packing_is_the_same_text(tmp_path: Path) -> None:
    texts = [f"document {i}, é" for i in range(3000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines, asbytes=True))
    table = pa.table({"content": texts, "url": ["u"] * len(texts)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        assert answers("text", str(tmp_path / name)) == texts, name
    assert answers("text", str(tmp_path / "a.parquet"), column="content") == texts
    source = TextReader("x", str(tmp_path / "a.parquet"), column="content")
    assert source.count(0) == 3000  # without opening it
    with pytest.raises(UserError, match=r"no usable sample in .*'column_absent': 1"):
        answers("text", str(tmp_path / "a.parquet"))


def test_rows_without_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": ["a", None, "", "b"]}), tmp_path / "a.parquet")
    source = TextReader("x", str(tmp_path / "a.parquet"))
    assert source.record(0).answer + source.record(3).answer == "ab"
    for index in (1, 2):
        with pytest.raises(SkipSample, match="text_empty"):
            source.record(index)


def test_shards_of_a_command_and_of_a_file_system(sample_data: Path, tmp_path: Path) -> None:
    shards = [tmp_path / f"train-{number}.tar" for number in range(2)]
    for shard, domain in zip(shards, ("real", "synthetic"), strict=True):
        shard.write_bytes(next(sample_data.glob(f"{domain}/train-*.tar")).read_bytes())
    expected = answers("image_text", [str(shard) for shard in shards])
    piped = f"pipe:cat {tmp_path}/train-{{0..1}}.tar"
    assert answers("image_text", piped) == expected
    memory = fsspec.filesystem("memory")
    for shard in shards:
        memory.pipe_file(f"/bucket/{shard.name}", shard.read_bytes())
    url = "memory://bucket/train-{0..1}.tar"
    assert answers("image_text", url) == expected
    # Images come from the copy; keys do not say where the data lie.
    here = ImageTextReader("x", [str(shard) for shard in shards])
    there = ImageTextReader("x", url)
    assert (load_image(there.record(3).images[0], 32) == load_image(here.record(3).images[0], 32)).all()
    assert there.record(3).key == here.record(3).key == ImageTextReader("x", piped).record(3).key
    # Each shard was fetched once.
    fetched = {path.name for path in cache_folder("files").iterdir()}
    assert len(fetched) == 2 * len(shards)


def test_instructions_from_elsewhere_need_to_know_where_their_images_lie(sample_data: Path) -> None:
    path = f"pipe:cat {sample_data}/instructions/val.json"
    with pytest.raises(UserError, match="say with root=FOLDER"):
        InstructionReader("x", path)
    source = InstructionReader("x", path, root=str(sample_data / "instructions"))
    assert source.record(0).images[0].path.startswith(str(sample_data))


def test_a_scheme_that_nothing_reads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nosuch://a/b\.tar: .*nosuch"):
        local_file("nosuch://a/b.tar")


def test_several_attempts_then_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(files, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(files.time, "sleep", waits.append)
    # Fails twice, then works.
    count = tmp_path / "count"
    command = f"""pipe:echo x >> {count}; test $(wc -l < {count}) -ge 3 && echo '{{"text": "a"}}'"""
    assert answers("text", command) == ["a"]
    assert waits == [0.5, 1.0]
    with pytest.raises(SkipSample, match=r"shard_missing: pipe:exit 3: the command ended with status 3"):
        build_reader("text", "x", "pipe:exit 3").open(0)
    gone = tmp_path / "gone.jsonl"
    gone.write_text("{}")
    source = build_reader("text", "x", str(gone))
    gone.unlink()
    with pytest.raises(SkipSample, match="shard_missing"):
        source.open(0)
    left = [path.name for path in cache_folder("files").iterdir()]
    assert not any(name.startswith(".") for name in left)  # nothing half-written


def test_the_cache_is_bounded_and_keeps_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHINX_CACHE_GB", "0.00025")
    first = f"pipe:head -c 100000 /dev/zero; : {tmp_path}"
    path, _ = local_file(first)
    hold = Hold(path)
    second, _ = local_file(first + " second")
    third, _ = local_file(first + " third")
    assert Path(path).exists()  # the oldest, but held
    assert not Path(second).exists()
    assert Path(third).exists()
    del hold
    local_file(first + " fourth")
    assert not Path(path).exists()
    assert Path(local_file(first)[0]).exists()  # and fetched again
