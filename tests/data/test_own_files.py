"""Files of one's own: folders of pictures and tables, whose kind is found by looking at them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from sphinx_pl.data.images import image_size, load_image
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import build_reader
from sphinx_pl.data.sampling.config import SourceConfig
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError
from tests.data.test_all_is_counted import counters, left_out


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(folder / name)


def outcomes(source: Any) -> list[str]:
    """The answers, or why there is none."""
    items = []
    for index in range(len(source)):
        try:
            record = source.record(index)
            for image in record.images:
                load_image(image, 8)
            items.append(record.answer)
        except SkipSample as bad:
            items.append(bad.reason)
    return items


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_of_captions(tmp_path: Path, delimiter: str, encoding: str, end: str) -> None:
    pictures(tmp_path, "a/1.png", "a/2.png")
    rows = [
        ["File_Name", "split", "Caption"],
        ["a/1.png", "x", '"a cat, a dog; two\nlines and a ""quote"""'],
        [],
        ["a\\2.png", "", "NA"],
        ["a/1.png", "y", "None"],
        ["a/1.png", "y", "007"],
        ["a/3.png", "y", "no such file"],
        ["", "y", "no image"],
        ["https://x.org/1.png", "y", "elsewhere"],
        ["a/1.png", "y", " "],
        ["a/1.png", "one too few"],
        ["a/2.png", "y", "Käse"],
    ]
    text = end.join(delimiter.join(row) for row in rows)
    (tmp_path / "photos.csv").write_bytes(text.encode(encoding))
    source = build_reader("table", "x", str(tmp_path / "photos.csv"))
    assert outcomes(source) == [
        'a cat, a dog; two\nlines and a "quote"',
        "NA",
        "None",
        "007",
        "image_missing",
        "image_absent",
        "image_is_url",
        "caption_empty",
        "row_malformed",
        "Käse",
    ]
    record = source.record(0)
    assert (record.task, record.meta) == ("caption", {"split": "x"})


def test_a_table_of_questions_and_filters(tmp_path: Path) -> None:
    pictures(tmp_path / "pics", "1.png")
    rows = ["image,question,answer,score", "1.png,What?,red,0.9", ",How are you?,Fine.,0.1", "1.png,What?,,1"]
    (tmp_path / "qa.csv").write_text("\n".join([*rows, "1.png,Which?,blue,0.2"]))
    path, root = str(tmp_path / "qa.csv"), str(tmp_path / "pics")
    source = build_reader("table", "x", path, root=root)
    assert outcomes(source) == ["red", "Fine.", "answer_empty", "blue"]
    assert [len(source.record(index).images) for index in (0, 1)] == [1, 0]
    assert source.record(0).task == "chat"
    assert build_reader("table", "x", path, root=root, task="short_vqa").record(0).task == "short_vqa"
    filtered = build_reader("table", "x", path, root=root, filters={"columns": {"score": {"min": 0.5}}})
    assert outcomes(filtered) == ["red", "score", "answer_empty", "score"]


COLUMNS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("width", {"min": 10}, ["a", "b"]),
    ("width", {"min": 20}, ["b"]),
    ("year", {"in": [2021]}, ["b"]),
    ("year", {"not_in": [2021]}, ["a"]),
    ("ok", {"in": [True]}, ["a"]),
    ("alt", {"in": ["b"]}, ["b"]),
    ("file", {"not_in": ["1.png"]}, ["b"]),
    ("empty", {"min": 0}, []),
]


@pytest.mark.parametrize(("column", "conditions", "kept"), COLUMNS)
def test_filters_see_every_column_of_a_csv_as_what_it_says(
    tmp_path: Path, column: str, conditions: dict[str, Any], kept: list[str]
) -> None:
    rows = ["file,alt,width,height,year,ok,empty", "1.png,a,16,12.0,2020,True,", "2.png,b,32,24,2021,false,"]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    options: dict[str, Any] = {"columns": {"caption": "alt"}, "filters": {"columns": {column: conditions}}}
    source = build_reader("table", "x", str(tmp_path / "x.csv"), **options)
    source.check_shard(source.open(0))
    items = []
    for index in range(2):
        try:
            items.append(source.record(index).answer)
        except SkipSample as bad:
            assert bad.reason in (column, f"{column}_absent")  # noqa: PT017
    assert items == kept
    plain = build_reader("table", "x", str(tmp_path / "x.csv"), columns={"caption": "alt"})
    assert [plain.record(index).sizes for index in range(2)] == [((16, 12),), ((32, 24),)]


UNREAD = [
    ("image_id,question,answer\n7,q,a\n", "image_id", r"columns=\{image: image_id\}"),
    ("img_path,question,answer\n1.png,q,a\n", "img_path", r"columns=\{image: img_path\}"),
    ("thing,question,answer\n1.png,q,a\n", "thing", r"columns=\{image: thing\}"),
    ("image,image2,question,answer\n1.png,2.png,q,a\n", "image2", "a file of instructions"),
    ('image,question,choices,answer\n1.png,q,"a, b",a\n', "choices", "a file of instructions"),
    ("image\tquestion\tA\tB\tanswer\n1.png\tq\tcat\tdog\tA\n", "A", "a file of instructions"),
    ("image,question,option_a,answer\n1.png,q,cat,a\n", "option_a", "a file of instructions"),
    ("image,caption,video\n1.png,a,1.mp4\n", "video", "images only"),
]


@pytest.mark.parametrize(("text", "column", "advice"), UNREAD)
def test_a_column_with_a_picture_or_options_is_not_passed_over(
    tmp_path: Path, text: str, column: str, advice: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"the column '{column}' is not read.*{advice}.*ignore_columns=.{column}"):
        build_reader("table", "x", str(path)).open(0)
    ignored = [name for name in ("A", "B") if column == "A"] or [column]
    assert len(build_reader("table", "x", str(path), ignore_columns=ignored).open(0)) == 1
    # A column without a value says nothing.
    empty = text.splitlines()[0]
    path.write_text(f"{empty}\n")
    assert len(build_reader("table", "x", str(path)).open(0)) == 0


def test_pictures_that_only_have_names_have_no_columns_to_filter(tmp_path: Path) -> None:
    pictures(tmp_path, "a_cat.png")
    named = build_reader("folder", "x", str(tmp_path), captions="names", filters={"columns": {"sim": {"min": 1}}})
    with pytest.raises(UserError, match="they have no columns"):
        named.check_shard(named.open(0))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,caption,caption\n1.png,a,b\n")
    with pytest.raises(UserError, match="two columns 'caption'"):
        build_reader("table", "x", str(tmp_path / "x.csv")).open(0)


def test_a_table_that_cannot_be_read_says_what_it_has(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("photo_id,alt\n1.png,a cat\n")
    with pytest.raises(UserError, match=r"x\.csv has the columns photo_id, alt: a source needs image and caption"):
        len(build_reader("table", "x", str(path)))
    named = build_reader("table", "x", str(path), columns={"image": "photo_id", "caption": "alt"})
    assert outcomes(named) == ["image_missing"]
    with pytest.raises(UserError, match=r"data\.sources\.x\.columns\.image=photo: .*did you mean 'photo_id'"):
        len(build_reader("table", "x", str(path), columns={"image": "photo", "caption": "alt"}))
    # A quote that is never closed would take all rows behind it.
    pictures(tmp_path, "1.png")
    path.write_text('image,caption\n1.png,a cat\n1.png,"a dog\n1.png,a cow\n1.png,an owl\n')
    total = counters(processor, {"kind": "table", "path": str(path)})
    assert (total["seen"], left_out(total)) == (1, {"skipped/quote_unclosed": 1})
    # Another encoding is counted, and can be named.
    path.write_bytes("image,caption\n1.png,a cat\n1.png,Käse\n".encode("cp1252"))
    total = counters(processor, {"kind": "table", "path": str(path)})
    assert (total["samples"], left_out(total)) == (1, {"skipped/caption_not_utf8": 1})
    assert outcomes(build_reader("table", "x", str(path), encoding="cp1252")) == ["a cat", "Käse"]


def test_folders(processor: Processor, tmp_path: Path) -> None:
    pictures(tmp_path / "f", "a_red_square.png", "sub/b v1.5.JPG", "c.png", "._c.png")
    with pytest.raises(UserError, match=r"has 3 pictures without a caption: put NAME\.txt .*captions=names"):
        build_reader("folder", "x", str(tmp_path / "f")).open(0)
    assert outcomes(build_reader("folder", "x", str(tmp_path / "f"), captions="names")) == [
        "a red square",
        "c",
        "b v1.5",
    ]
    (tmp_path / "f/a_red_square.txt").write_text("a square")
    (tmp_path / "f/sub/b v1.5.json").write_text('{"caption": "b"}')
    (tmp_path / "f/notes.md").write_text("notes")
    source = {"kind": "folder", "path": str(tmp_path / "f")}
    total = counters(processor, source)
    expected = {"skipped/caption_absent": 1, "unused/hidden": 1, "unused/md": 1}
    assert (total["samples"], left_out(total)) == (2, expected)
    (tmp_path / "f/metadata.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n" for row in ({"file_name": "c.png", "text": "c"}, {"file_name": "d.png", "text": "d"})
        )
    )
    total = counters(processor, source)
    expected = {"skipped/image_missing": 1, "skipped/caption_absent": 2, "unused/hidden": 1, "unused/md": 1}
    assert total["seen"] == 2
    assert left_out(total) == expected | {"unused/txt": 1, "unused/json": 1}


KINDS: list[tuple[str, str, str, str]] = [
    ("x.csv", "image,caption\na.png,a\n", "table", "image"),
    ("x.TSV", "image\tcaption\na.png\ta\n", "table", "image"),
    ("x.csv", "question,answer\nq,a\n", "table", "text"),
    ("x.csv", "Image,Question,Answer\n,q,a\n", "table", "image"),
    ("x.csv", "q,a\nq,a\n", "table", "image"),
    ("x.json", '[{"messages": [{"content": [{"type": "image", "image": "a.png"}]}]}]', "instructions", "image"),
    (
        "x.json",
        json.dumps([{"question": "a", "answer": "b"}] * 100 + [{"image": "a.png"}] * 9),
        "instructions",
        "image",
    ),
    ("x.json", '[{"conversations": []}]', "instructions", "text"),
    ("x.json", '[{"image": "a.png", "conversations": []}]', "instructions", "image"),
    ("x.jsonl", '{"question": "a", "answer": "b"}\n', "instructions", "text"),
    ("x.jsonl", '{"file_name": "a.png", "text": "a"}\n', "table", "image"),
    ("x.jsonl", '{"text": "a"}\n', "text", "text"),
    ("x.txt", "a text", "text", "text"),
    ("x.tar", "", "image_text", "image"),
    ("x/a.png", "", "folder", "image"),
]


@pytest.mark.parametrize(("name", "data", "kind", "modality"), KINDS)
def test_the_kind_is_found_by_looking(tmp_path: Path, name: str, data: str, kind: str, modality: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(data)
    config = SourceConfig.from_dict("mine", {"path": str(tmp_path / name.partition("/")[0])})
    assert (config.kind, config.modality) == (kind, modality)


def test_what_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"a": 1}]')
    (tmp_path / "x.bin").write_text("")
    with pytest.raises(UserError, match=r'data\.sources\.mine\.path=.*entries with the keys \["a"\]'):
        SourceConfig.from_dict("mine", {"path": str(tmp_path / "x.json")})
    with pytest.raises(UserError, match=r"set data\.sources\.mine\.kind=.*folder"):
        SourceConfig.from_dict("mine", {"path": str(tmp_path / "x.bin")})


def test_files_of_several_kinds_are_no_source(tmp_path: Path) -> None:
    for name in ("a.csv", "b.tsv", "c.tar", "d.txt"):
        (tmp_path / name).write_text("image,caption\n")
    paths = [str(tmp_path / name) for name in ("a.csv", "b.tsv", "c.tar", "d.txt")]
    assert SourceConfig.from_dict("x", {"path": paths[:2]}).kind == "table"
    for several in (paths[1:3], paths[2:], str(tmp_path / "*")):
        with pytest.raises(
            UserError, match=r"data\.sources\.x\.path: files of several kinds \(.*make a source of each"
        ):
            SourceConfig.from_dict("x", {"path": several})


@pytest.mark.parametrize(
    ("kind", "option"), [("table", "ignore_columns"), ("instructions", "ignore_keys"), ("instructions", "tasks")]
)
def test_a_text_in_place_of_a_list_of_names_is_refused(tmp_path: Path, kind: str, option: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "caption": "a"}')
    with pytest.raises(UserError, match=rf"data\.sources\.x\.{option}=chat must be a list of names, such as .chat"):
        build_reader(kind, "x", str(tmp_path / "x.jsonl"), **{option: "chat"})


def test_pictures_beside_a_text_are_no_text_source(tmp_path: Path) -> None:
    for columns in ({"image": [{"bytes": b"x", "path": "a.png"}]}, {"image_path": ["a.png"]}):
        parquet.write_table(pyarrow.table({**columns, "text": ["a cat"]}), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=rf"its column '{next(iter(columns))}' may hold pictures.*kind=text"):
            SourceConfig.from_dict("mine", {"path": str(tmp_path / "x.parquet")})
    parquet.write_table(pyarrow.table({"text": ["a cat"], "url": ["x"]}), tmp_path / "x.parquet")
    assert SourceConfig.from_dict("mine", {"path": str(tmp_path / "x.parquet")}).kind == "text"
    for key in ("images", "image_url", "video"):
        (tmp_path / "x.jsonl").write_text(json.dumps({key: ["a.png"], "text": "a cat"}))
        with pytest.raises(UserError, match=f"its column '{key}' may hold pictures"):
            SourceConfig.from_dict("mine", {"path": str(tmp_path / "x.jsonl")})


def test_parts_are_all_of_it_and_share_no_image(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{i}.png" for i in range(30)))
    rows = [f"{('', './')[n]}{i}.png,caption {i} {n}\n" for n in range(2) for i in range(30)]
    (tmp_path / "x.csv").write_text("image,caption\n" + "".join(rows))
    parts = {}
    for part in ("", "train", "held_out"):
        source = SourceConfig.from_dict("x", {"path": str(tmp_path / "x.csv"), "part": part}).open("x")
        records = [source.record(index) for index in range(len(source))]
        parts[part] = ({record.answer for record in records}, {record.images for record in records})
    assert parts["train"][0] | parts["held_out"][0] == parts[""][0]
    assert not parts["train"][1] & parts["held_out"][1]
    assert (len(parts["held_out"][0]), len(parts["held_out"][1])) == (6, 3)
    with pytest.raises(UserError, match=r"data\.sources\.x\.part=trian: did you mean 'train'"):
        SourceConfig.from_dict("x", {"path": str(tmp_path / "x.csv"), "part": "trian"})


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    pictures(tmp_path, "here/1.png", "here/more/2.png", "elsewhere/deep/3.png")
    here = tmp_path / "here"
    for name, target in (
        ("loop", here),
        ("again", here / "more"),
        ("out", tmp_path / "elsewhere"),
        ("gone", "nowhere"),
    ):
        (here / name).symlink_to(target)
    source = build_reader("folder", "x", str(here), captions="names")
    assert outcomes(source) == ["1", "2", "3"]
    assert [source.record(i).key for i in range(3)] == ["here/1.png", "here/more/2.png", "here/out/deep/3.png"]


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "SEP=;\r"])
def test_excel_s_line_that_names_the_separator(tmp_path: Path, line: str) -> None:
    pictures(tmp_path, "1.png")
    (tmp_path / "a.csv").write_text(f"\ufeff{line}\nimage;caption, in English\n1.png;red, all of it\n", newline="")
    source = build_reader("table", "x", str(tmp_path / "a.csv"), columns={"caption": "caption, in English"})
    assert outcomes(source) == ["red, all of it"]


@pytest.mark.parametrize("path", [5, None, {}, {"a": 1}, [], [5], "~nobody-has-this-name/a.csv", "a\0b", "x" * 5000])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(UserError, match=r"source 'x'|data\.sources\.x\.path"):
        SourceConfig.from_dict("x", {"path": path})


def test_names_with_accents_are_found_in_either_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "été.png") for form in ("NFC", "NFD"))
    for folder, there, named in (("a", composed, decomposed), ("b", decomposed, composed)):
        pictures(tmp_path, f"{folder}/{there}")
        (tmp_path / folder / "metadata.csv").write_text(f"file_name,text\n{named},summer\n")
        source = build_reader("folder", "x", str(tmp_path / folder))
        assert outcomes(source) == ["summer"]
        assert image_size(source.record(0).images[0]) == (8, 6)
        assert not source.skipped


def test_a_file_s_own_name_comes_before_what_it_means_as_a_pattern(tmp_path: Path) -> None:
    pictures(tmp_path, "1.png")
    own = tmp_path / "a{1,2}[z]*.csv"
    for file in (own, tmp_path / "a1z.csv", tmp_path / "a2z.csv"):
        file.write_text(f"image,caption\n1.png,{len(file.name)} letters\n")
    assert outcomes(build_reader("table", "x", str(own))) == [f"{len(own.name)} letters"]
    own.unlink()
    assert outcomes(build_reader("table", "x", str(own))) == ["7 letters", "7 letters"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"question": "a", "answer": "b"},\n' * 2, "none of its entries .*json"),
        ("a.json", b'[["question", "answer"]]', "none of its entries .*not an object"),
        ("a.csv", "image,caption\n1.png,a\n".encode("utf-16-le"), r"no text in utf-8: .*x\.encoding"),
        ("a.csv", b"PK\x03\x04\x00\x01\n1,2\n", "no text in utf-8"),
    ],
)
def test_a_file_that_is_something_else_says_what_is_wrong(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        len(SourceConfig.from_dict("x", {"path": str(tmp_path / name)}).open("x"))
