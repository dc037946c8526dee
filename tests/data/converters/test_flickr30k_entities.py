"""Structure: README.md and flickr30k_entities_utils.py of https://github.com/BryanPlummer/flickr30k_entities."""

from __future__ import annotations

import pytest

from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.utils.errors import UserError

from .conftest import Run

XML = """<annotation>
  <filename>65567.jpg</filename>
  <size><width>500</width><height>375</height><depth>3</depth></size>
  <unknown>1</unknown>
  <object>
    <name>255542</name>
    <bndbox><xmin>1</xmin><ymin>11</ymin><xmax>101</xmax><ymax>375</ymax></bndbox>
  </object>
  <object>
    <name>255543</name><name>255550</name>
    <bndbox><xmin>201</xmin><ymin>21</ymin><xmax>301</xmax><ymax>301</ymax></bndbox>
  </object>
  <object>
    <name>255543</name>
    <bndbox><xmin>401</xmin><ymin>21</ymin><xmax>451</xmax><ymax>301</ymax></bndbox>
  </object>
  <object>
    <name>255551</name>
    <bndbox><xmin>401</xmin><ymin>21</ymin><xmax>951</xmax><ymax>301</ymax></bndbox>
  </object>
  <object>
    <name>255551</name>
    <bndbox><xmin>401</xmin><ymin>21</ymin><xmax>951</xmax></bndbox>
  </object>
  <object><name>255549</name><scene>1</scene><nobndbox>0</nobndbox></object>
</annotation>
"""
SENTENCES = """[/EN#255542/people A bearded man] , and [/EN#255543/people two girls] in [/EN#255550/clothing a dress] .
[/EN#255542/bodyparts/people A man 's arm] at [/EN#255549/scene a formal event] with [/EN#0/notvisual each other]
[/EN#255549/scene A formal event] .
[/EN#255542/people A man] with {0} in braces .
[/EN#255542/people A man] and [ more .
[/EN#255542/people A man] sees [/EN#255551/people two boys] .
A caption of another image .
"""
# Ten entities that would be 10**10 letters.
LAUGHS = (
    "<!DOCTYPE annotation [<!ENTITY a0 'a'>"
    + "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 11))
    + "]>"
)


def files(**more: str) -> dict[str, str]:
    return {
        "train.txt": "65567\n1000\n1001\n../secret\n",
        "UNRELATED_CAPTIONS": "# format: <imageID> <sentence number>\n65567 7\n",
        "Annotations/65567.xml": XML,
        "Sentences/65567.txt": SENTENCES,
        "Annotations/1000.xml": XML.replace("</size>", ""),
        "Sentences/1000.txt": "[/EN#255542/people A man] .\n",
        "Annotations/1001.xml": LAUGHS + XML.replace("65567.jpg", "&a10;"),
        "Sentences/1001.txt": "[/EN#255542/people A man] .\n",
    } | more


def test_phrases_are_tied_to_their_boxes(run: Run) -> None:
    records, report = run("flickr30k_entities", files())
    image, size = (ImageRef("flickr30k-images/65567.jpg"),), ((500, 375),)
    man, girl, other = (0.0, 10.0, 100.0, 374.0), (200.0, 20.0, 300.0, 300.0), (400.0, 20.0, 450.0, 300.0)
    assert records == [
        Record(
            "65567-1",
            "grounded_caption",
            image,
            size,
            answer="{0}, and {1,2} in {3}.",
            regions=(
                Region(man, "A bearded man"),
                Region(girl, "two girls"),
                Region(other, "two girls"),
                Region(girl, "a dress"),
            ),
        ),
        Record(
            "65567-2",
            "grounded_caption",
            image,
            size,
            answer="{0} at a formal event with each other",
            regions=(Region(man, "A man 's arm"),),
        ),
    ]
    assert report.dropped == {
        "caption_markup": 2,
        "part_left_out": 1,  # the boys' boxes: what is asked for are the boxes of all that is named
        "xml_malformed": 1,
        "xml_declaration": 1,
        "entry_malformed": 1,
    }
    assert report.skipped == {"caption_without_box": 1, "caption_unrelated": 1}
    assert report.left_out == {"box_outside": 1, "part_malformed": 1}


def test_a_missing_file_is_named(run: Run) -> None:
    there = files()
    del there["Annotations/65567.xml"]
    with pytest.raises(UserError, match=r"has no Annotations/65567.xml: it is part of https"):
        run("flickr30k_entities", there)
