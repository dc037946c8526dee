"""Which image-text pairs are wanted, and that the others are counted as filtered, not as bad."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.inspect.duplicates import find_duplicates
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import ImageTextReader
from sphinx_pl.data.sampling.mixture import Mixture
from sphinx_pl.data.skip import Filtered, SkipSample
from sphinx_pl.utils.errors import UserError

Pair = tuple[str, dict[str, Any]]


def picture(width: int = 8, height: int = 6, colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, pairs: list[Pair], images: list[bytes] | None = None) -> str:
    """A shard as img2dataset writes it: the caption in .txt, columns in .json."""
    with tarfile.open(path, "w") as tar:
        for i, (caption, columns) in enumerate(pairs):
            image = images[i] if images else picture()
            for extension, data in (("png", image), ("txt", caption.encode()), ("json", json.dumps(columns).encode())):
                info = tarfile.TarInfo(f"{i:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def outcome(source: ImageTextReader, index: int) -> str:
    try:
        return source.record(index).answer
    except SkipSample as bad:
        return bad.counter


@pytest.mark.parametrize(
    ("filters", "pairs", "expected"),
    [
        ({"min_chars": 3, "max_chars": 5}, ["ab", "abc", "abcde", "abcdef"], [0, 1, 1, "caption_chars"]),
        ({"min_words": 2}, ["one", "two words", "-- !"], ["caption_words", 1, "caption_words"]),
        (
            {"columns": {"similarity": {"min": 0.28}}},
            [("a", {"similarity": 0.28}), ("b", {"similarity": 0.2}), ("c", {}), ("d", {"similarity": "high"})],
            [1, "similarity", "similarity_absent", "similarity"],
        ),
        (
            {"columns": {"punsafe": {"max": 0.5}, "NSFW": {"in": ["UNLIKELY"]}}},
            [("a", {"punsafe": 0.5, "NSFW": "UNLIKELY"}), ("b", {"punsafe": 0.1, "NSFW": "NSFW"})],
            [1, "NSFW"],
        ),
        (
            {"columns": {"LICENSE": {"not_in": ["?"]}}},
            [("a", {"LICENSE": "?"}), ("b", {"LICENSE": "by"})],
            ["LICENSE", 1],
        ),
        (
            {"parrot_column": "ocr", "parrot_share": 0.6},
            [
                ("Big Sale today only", {"ocr": "SALE! today"}),  # 2 of 4
                ("Big Sale today only", {"ocr": "sale TODAY big"}),  # 3 of 4
                ("sale sale sale", {"ocr": "sale"}),  # a word counts as often as it is there
                ("no text in it", {"ocr": ""}),
                ("no column", {}),
            ],
            [1, "parrot", 1, 1, 1],
        ),
    ],
)  # fmt: skip
def test_captions_and_columns(tmp_path: Path, filters: dict[str, Any], pairs: list[Any], expected: list[Any]) -> None:
    whole: list[Pair] = [pair if isinstance(pair, tuple) else (pair, {}) for pair in pairs]
    source = ImageTextReader("web", write(tmp_path / "a.tar", whole), filters=filters)
    for index, (pair, reason) in enumerate(zip(whole, expected, strict=True)):
        reason = "caption_chars" if reason == 0 else reason
        assert outcome(source, index) == (pair[0] if reason == 1 else f"filtered/{reason}")


@pytest.mark.parametrize("annotated", [True, False])
def test_every_pair_has_caption_width_and_height(tmp_path: Path, annotated: bool) -> None:
    pairs: list[Pair] = [
        ("a cat", {"caption": "a cat", "width": 40, "height": 20, "original_width": 80} if annotated else {}),
        ("a dog", {"caption": "a dog", "width": 8, "height": 6, "original_width": 9} if annotated else {}),
    ]
    path = write(tmp_path / "a.tar", pairs, [picture(40, 20), picture(8, 6)])
    columns: dict[str, Any] = {"width": {"min": 40}, "height": {"max": 20, "min": 7}, "caption": {"in": ["a cat"]}}
    for column, conditions in columns.items():
        source = ImageTextReader("web", path, filters={"columns": {column: conditions}})
        assert [outcome(source, i) for i in range(2)] == ["a cat", f"filtered/{column}"]
    source = ImageTextReader("web", path, filters={"columns": {"original_width": {"min": 80}}})
    expected = ["a cat", "filtered/original_width"] if annotated else ["filtered/original_width_absent"] * 2
    assert [outcome(source, i) for i in range(2)] == expected


@pytest.mark.parametrize("filters", [{"columns": {"similarty": {"min": 0}}}, {"parrot_column": "similarty"}])
def test_a_column_that_is_nowhere_is_an_error_before_the_run(
    tmp_path: Path, processor: Processor, filters: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.tar", [("a", {"similarity": 1, "ocr": ""})])
    source = {"kind": "image_text", "path": path, "filters": filters}
    data = DataModule(processor, {"web": source}, {}, {"row_length": 256, "micro_batch_rows": 4})
    with pytest.raises(UserError, match=r"data\.sources\.web\.filters\..*'similarty': did you mean 'similarity'"):
        data.probe()


def test_sides_and_aspect_are_the_columns_or_else_the_headers(tmp_path: Path) -> None:
    sizes = [(8, 6), (5, 40), (40, 8), (8, 41)]
    images = [picture(*size) for size in sizes]
    for columns in (lambda size: {"width": size[0], "height": size[1]}, lambda size: {}):
        path = write(tmp_path / "a.tar", [("a", columns(size)) for size in sizes], images)  # type: ignore[no-untyped-call]
        source = ImageTextReader("web", path, filters={"min_side": 6, "max_aspect": 5})
        assert [outcome(source, i) for i in range(4)] == ["a", "filtered/image_side", "a", "filtered/image_aspect"]


def test_filtered_is_not_skipped(tmp_path: Path, processor: Processor) -> None:
    path = write(tmp_path / "a.tar", [(f"caption {i}", {"similarity": i / 10}) for i in range(10)])
    source = {"kind": "image_text", "path": path, "filters": {"columns": {"similarity": {"min": 0.55}}}}
    mixture = Mixture({"web": source}, processor, seed=0)
    samples = [sample for _ in range(10) for sample in mixture.draw()]
    assert len(samples) == 4
    assert mixture.counts["web/filtered/similarity"] == 6
    assert not any("skipped" in key for key in mixture.counts)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"min_sides": 3}, r"data\.sources\.web\.filters.*min_sides"),
        ({"columns": {"similarity": {"above": 3}}}, "'above' is not one of min, max, in, not_in"),
        ({"columns": {"similarity": 3}}, "3 is not one of"),
        ({"parrot_share": 0}, "parrot_share=0"),
        ({"columns": {"similarity": {"min": "high"}}}, r"similarity\.min=high must be a number"),
        ({"columns": {"similarity": {"min": 0.3, "max": 0.2}}}, r"similarity\.min=0\.3 is above max=0\.2"),
        ({"columns": {"language": {"in": "en"}}}, r"language\.in=en must be a list of values"),
        ({"columns": {"language": {"in": []}}}, r"language\.in=\[\] must be a list of values"),
        ({"min_chars": 50, "max_chars": 10}, r"min_chars=50 is above max_chars=10"),
        ({"max_aspect": 0.5}, r"max_aspect=0\.5 .* at least 1"),
    ],
)
def test_wrong_filters_are_refused(tmp_path: Path, filters: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageTextReader("web", write(tmp_path / "a.tar", [("a", {})]), filters=filters)


@pytest.mark.parametrize(
    ("by", "kept"),
    [("image", ["a.tar/0000", "a.tar/0001", "b.tar/0001"]), ("caption", ["a.tar/0000", "a.tar/0002", "b.tar/0001"])],
)
def test_all_but_the_first_of_equal_pairs_are_left_out(tmp_path: Path, by: str, kept: list[str]) -> None:
    red, blue, green = (picture(colour=colour) for colour in (250, 120, 10))
    write(tmp_path / "a.tar", [("one", {}), ("one", {}), ("two", {})], [red, blue, red])
    write(tmp_path / "b.tar", [("two", {}), ("three", {})], [blue, green])
    path = str(tmp_path / "{a,b}.tar")
    out = tmp_path / "duplicates.npy"
    assert find_duplicates(path, by, out) == (5, 0, 2)
    source = ImageTextReader("web", path, filters={"duplicates": str(out)})
    items = []
    for index in range(len(source)):
        with contextlib.suppress(Filtered):
            items.append(source.record(index).key)
    assert items == kept


def test_duplicates_by_a_column_and_what_cannot_be(tmp_path: Path) -> None:
    pairs: list[Pair] = [("a", {"sha256": "x"}), ("b", {}), ("c", {"sha256": "x"}), ("d", {})]
    path = write(tmp_path / "a.tar", pairs)
    assert find_duplicates(path, "sha256", tmp_path / "d.npy") == (4, 2, 1)  # without the column equal to none
    with pytest.raises(UserError, match="by=md5: none of 4 pairs has it"):
        find_duplicates(path, "md5", tmp_path / "d.npy")
    with pytest.raises(UserError, match=r"must end in \.npy"):
        find_duplicates(path, "image", tmp_path / "d.txt")
    with pytest.raises(UserError, match=r"filters\.duplicates=.*nowhere\.npy cannot be read"):
        ImageTextReader("web", path, filters={"duplicates": str(tmp_path / "nowhere.npy")}).record(0)
