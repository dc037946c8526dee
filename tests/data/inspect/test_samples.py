"""The page of `sphinx-data show`: it shows what the batches hold, and nothing of it runs."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sphinx_pl.cli.data import main
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.drawing import GIVEN, TRUE, draw, to_picture
from sphinx_pl.data.images import load_image
from sphinx_pl.data.inspect.samples import build_page
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import IGNORE, ImageRef
from sphinx_pl.utils.html import inline_picture, mark_unseen

VOID = {"meta", "img", "br", "path", "input"}


class Page(HTMLParser):
    """What the tests look for; checks on the way that tags nest and that nothing is loaded from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.cards: dict[str, dict[str, Any]] = {}
        self.bars: list[list[int]] = []
        self.scripts = 0
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        kind = values.get("class", "")
        self.scripts += tag == "script"
        assert not any(name.startswith("on") for name in values)
        assert all(values.get(name, "#").startswith(("#", "data:image/")) for name in ("src", "href"))
        if tag == "article":
            self.cards[values["id"]] = {"tokens": [], "chips": [], "images": [], "paths": [], "text": "", **values}
        elif tag == "img":
            self.card["images"].append(values["src"])
        elif tag == "path":
            self.card["paths"].append((kind, values["d"]))
        elif kind in ("seg", "pad"):
            self.bars[-1].append(int(re.findall(r"flex:(\d+)", values["style"])[0]))
        elif kind == "bar":
            self.bars.append([])
        elif tag in ("b", "i") and "title" in values and self._in_card:
            count = int(values.get("data-n", 1))
            self.card["tokens"] += [(tag == "b", int(id)) for id in values["title"][3:].split(",")[0].split(" ")]
            assert len(values["title"][3:].split(",")[0].split(" ")) == count
        if tag not in VOID:
            self.open.append((tag, values))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] in ("style", "script"):
            return
        self.text += data
        if self._in_card:
            self.card["text"] += data
            if self.open[-1][1].get("class") == "im":
                self.card["chips"].append(data)

    @property
    def card(self) -> dict[str, Any]:
        return list(self.cards.values())[-1]

    @property
    def _in_card(self) -> bool:
        return any(tag == "article" for tag, _ in self.open)


def picture(src: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(src.partition("base64,")[2]))).convert("RGB")


def sources(folder: Path) -> dict[str, Any]:
    return {
        "real": {"kind": "image_text", "path": f"{folder}/real/train-*.tar", "weight": 0.3},
        "scenes": {
            "kind": "instructions",
            "path": f"{folder}/instructions/train-scenes.json",
            "questions_per_sample": 4,
        },
        "text": {"kind": "text", "path": f"{folder}/text/train.jsonl", "weight": 0.3},
    }


def module(processor: Processor, sources: dict[str, Any], length: int = 192, **packing: Any) -> DataModule:
    return DataModule(
        processor, sources, {}, {"row_length": length, "micro_batch_rows": 4, "weighting": "sqrt"} | packing
    )


def shown(data: DataModule, n: int, accumulate: int = 1, grid: int = 1) -> Page:
    html, count = build_page(data, n, accumulate, grid, "a test")
    page = Page(html)
    assert len(page.cards) == count
    return page


def entries(folder: Path, entries: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
    (folder / "entries.json").write_text(json.dumps(entries))
    return {"mine": {"kind": "instructions", "path": str(folder / "entries.json"), **options}}


def image(folder: Path, name: str, size: tuple[int, int] = (32, 32), colour: str = "#336699") -> str:
    Image.new("RGB", size, colour).save(folder / name)
    return name


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_a_page_shows_what_the_batches_hold(processor: Processor, sample_data: Path) -> None:
    data = module(processor, sources(sample_data))
    page = shown(data, 20, accumulate=2)
    assert len(page.cards) == 20
    assert page.scripts == 1

    # The same steps again, read here by hand.
    planner = data.planner(2)
    plans = [plan for _ in range(len(page.bars) // 8) for plan in planner.plan()]
    batches = [data.collator(plan.rows) for plan in plans]
    expected = []
    for plan, batch in zip(plans, batches, strict=True):
        slots = set(batch.image_slots.tolist())
        for row, samples in enumerate(plan.rows):
            for segment, sample in enumerate(samples, start=1):
                places = (batch.segment_ids[row] == segment).nonzero().flatten().tolist()
                tokens = [
                    (t > places[0] and int(batch.labels[row, t - 1]) != IGNORE, int(batch.input_ids[row, t]))
                    for t in places
                    if row * 192 + t not in slots
                ]
                expected.append((sample, tokens))
    for (sample, tokens), card in zip(expected, page.cards.values(), strict=False):
        assert card["data-source"] == sample.source
        assert all(question.key in card["text"] for question in sample.questions)
        assert set(card["data-task"].split()) == {question.task for question in sample.questions}
        assert f"{sample.length} tokens, {sample.targets} supervised" in card["text"]
        assert card["tokens"] == tokens
        assert card["chips"] == [f"image 1 × {processor.tokens_per_image}"] * len(sample.images)
        assert len(card["images"]) == len(sample.images)

    # Bars: every row of every step, each as long as it is.
    assert len(page.bars) == 4 * len(plans)
    assert all(sum(bar) == 192 for bar in page.bars)
    used = [sum(sample.length for sample in row) for plan in plans for row in plan.rows]
    assert [sum(bar) - 192 + n for bar, n in zip(page.bars, used, strict=True)] == used
    assert f"{sum(used[:8]) / (8 * 192):.1%} of {8 * 192:,} positions" in page.text

    # Totals are those of the batches.
    totals = [sum(int(batch.counters[key]) for batch in batches) for key in ("tokens", "targets", "images")]
    questions = sum(len(sample.questions) for sample, _ in expected)
    numbers = "".join(f"{number:,}" for number in [len(expected), questions, *totals])
    assert f"all{numbers}100.0%" in page.text


def test_boxes_of_question_and_answer_are_drawn_on_the_picture(processor: Processor, tmp_path: Path) -> None:
    name = image(tmp_path, "a.png")
    data = module(
        processor,
        entries(
            tmp_path,
            [{"id": "a", "image": name, "conversations": talk("In [0.10,0.10,0.30,0.30]?", "[0.50,0.40,0.90,0.80]")}],
        ),
    )
    page = shown(data, 1)
    [src] = page.card["images"]
    plain = to_picture(load_image(ImageRef(str(tmp_path / name)), 32), 4)
    wanted = draw(plain, "[0.50,0.40,0.90,0.80]", "", processor.coordinates, "[0.10,0.10,0.30,0.30]")
    assert picture(src).tobytes() == wanted.tobytes() != plain.tobytes()
    # A corner by hand: 0.5 of 127 is 64, 0.1 of it 13.
    assert picture(src).getpixel((64, 60)) == tuple(bytes.fromhex(TRUE[1:]))
    assert picture(src).getpixel((13, 20)) == tuple(bytes.fromhex(GIVEN[1:]))


def test_a_box_that_questions_share_a_part_of_is_drawn_for_each(processor: Processor, tmp_path: Path) -> None:
    name = image(tmp_path, "a.png")
    asked = ["[0.11,0.12,0.30,0.30]", "[0.15,0.12,0.60,0.70]"]
    data = module(
        processor,
        entries(
            tmp_path,
            [{"id": str(i), "image": name, "conversations": talk(f"In {box}?", "x")} for i, box in enumerate(asked)],
            questions_per_sample=2,
        ),
    )
    page = shown(data, 1)
    assert "shared by 2 questions" in page.card["text"]
    plain = to_picture(load_image(ImageRef(str(tmp_path / name)), 32), 4)
    wanted = draw(plain, "", "", processor.coordinates, "".join(asked))
    assert sorted(picture(page.card["images"][0]).getdata()) == sorted(wanted.getdata())


def test_what_data_say_never_becomes_markup(processor: Processor, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\u202eevil\x00"
    conversation = {"id": hostile, "conversations": talk(hostile, f"answer {hostile}")}
    broken = {"id": hostile, "image": "<b>gone</b>.png", "conversations": talk("Hello?", "no")}
    wrong = {"id": f"{hostile} <i>no answer</i>", "conversations": talk("Hello?", " ")}
    turns = {"id": "<u>turns", "conversations": talk("Hello?", "a\n### b")}
    data = module(processor, entries(tmp_path, [conversation, broken, wrong, turns]), length=256)
    page = shown(data, 8)
    assert page.scripts == 1
    assert "onerror" in page.text
    assert "⟨U+202E⟩" in page.text
    assert not set("\u202e\x00") & set(page.html)
    mark_unseen("half a character: \ud800").encode()
    assert "skipped: answer_empty" in page.text
    assert "used: escaped" in page.text
    assert "<i>no answer</i>" in page.text
    # Should an escape ever be forgotten, the browser still runs nothing but our script.
    assert re.search(r"Content-Security-Policy.*default-src 'none'.*script-src 'sha256-", page.html)


def test_a_source_s_name_is_data_too(processor: Processor, sample_data: Path) -> None:
    name = "<u>web"
    page = shown(module(processor, {name: {"kind": "text", "path": f"{sample_data}/text/train.jsonl"}}), 3)
    assert page.card["data-source"] == name
    assert "<u>" not in page.html


def test_several_images_of_a_sample(processor: Processor, tmp_path: Path) -> None:
    names = [image(tmp_path, "a.png"), image(tmp_path, "b.png", colour="#aa3322")]
    text = "<image>One and <image>two?"
    data = module(
        processor,
        entries(tmp_path, [{"id": "a", "image": names, "conversations": talk(text, "[0.10,0.10,0.90,0.90]")}]),
    )
    card = shown(data, 1).card
    assert card["chips"] == [f"image {i} × {processor.tokens_per_image}" for i in (1, 2)]
    second = to_picture(load_image(ImageRef(str(tmp_path / "b.png")), 32), 4)
    assert picture(card["images"][1]).tobytes() == second.tobytes()
    assert picture(card["images"][0]).getpixel((13, 60)) == tuple(bytes.fromhex(TRUE[1:]))
    assert "boxes are drawn on the first" in card["text"]


def test_a_broken_image_says_why_and_the_other_one_is_shown(processor: Processor, tmp_path: Path) -> None:
    good = image(tmp_path, "a.png")
    (tmp_path / "bad.png").write_bytes(b"<html>404</html>")
    pair = {"id": "pair", "image": [good, "bad.png"], "conversations": talk("<image><image>Two?", "yes")}
    gone = {"id": "gone", "image": "gone.png", "conversations": talk("One?", "yes")}
    page = shown(module(processor, entries(tmp_path, [pair, gone])), 6)
    cards = {("pair" if "pair" in card["text"] else "gone"): card for card in page.cards.values()}
    assert "broken image 2" in cards["pair"]["text"]
    assert "image_unreadable" in cards["pair"]["text"]
    assert len(cards["pair"]["images"]) == 1
    assert "image_missing" in cards["gone"]["text"]
    for card in cards.values():
        assert "0 supervised" in card["text"]
        assert not any(target for target, _ in card["tokens"])
    assert "6 samples of the 6 shown cannot be learned from" in page.text
    assert "decoded, then masked: image_missing" in page.text


def test_text_alone_and_a_model_without_vision(processor: Processor, sample_data: Path) -> None:
    blind = dataclasses.replace(processor, image_size=0, tokens_per_image=0)
    page = shown(module(blind, {"text": sources(sample_data)["text"]}), 5)
    assert len(page.cards) == 5
    assert not any(card["images"] or card["chips"] for card in page.cards.values())
    assert all(card["tokens"][0][0] is False for card in page.cards.values())  # BOS
    assert "</s>" in page.text


def test_characters_in_bytes_are_one_element_with_all_their_tokens(processor: Processor, tmp_path: Path) -> None:
    page = shown(
        module(processor, entries(tmp_path, [{"id": "a", "conversations": talk("é你?", "你")}], modality="text")), 1
    )
    assert "é" in page.card["text"]
    assert page.card["text"].count("你") == 2
    ids = [id for _, id in page.card["tokens"]]
    assert processor.tokenizer.decode(ids).count("你") == 2


def test_views_are_outlined_and_skipped_ones_crossed_out(processor: Processor, tmp_path: Path) -> None:
    wide = image(tmp_path, "wide.png", size=(120, 20))
    square = image(tmp_path, "square.png")
    per_view = (2, *[1] * 9)
    skipping = dataclasses.replace(processor, image_size=33, tokens_per_image=sum(per_view), view_tokens=(4, *[2] * 9))
    told = [
        {"id": "wide", "image": wide, "conversations": talk("Wide?", "yes")},
        {"id": "square", "image": square, "conversations": talk("Square?", "yes")},
    ]
    page = shown(module(skipping, entries(tmp_path, told)), 2, grid=3)
    for card in page.cards.values():
        paths = dict(card["paths"])
        assert "M1 0V3M0 1H3" in paths["cuts"]
        if "Wide?" in card["text"]:
            # The upper and the lower third hold nothing of it: 6 of 9 views are one token each.
            assert paths["skipped"].count("M") == 6
            assert all(f"M{x} {y}l1 1" in paths["skipped"] for x in range(3) for y in (0, 2))
            assert card["chips"] == ["image 1 × 16"]
            assert "10 views, 6 skipped" in card["text"]
        else:
            assert "skipped" not in paths
            assert card["chips"] == ["image 1 × 22"]


def test_it_ends_where_the_data_end(processor: Processor, tmp_path: Path) -> None:
    told = [{"id": str(i), "conversations": talk("Hello?", "yes")} for i in range(3)]
    data = DataModule(
        processor, entries(tmp_path, told), {}, {"row_length": 96, "micro_batch_rows": 2}, mixing={"epochs": 1}
    )
    assert len(shown(data, 50).cards) == 3


def test_data_of_which_nothing_is_any_use_say_why(processor: Processor, tmp_path: Path) -> None:
    told = [{"id": f"silent {i}", "conversations": talk("Hello?", " ")} for i in range(3)]
    data = DataModule(
        processor, entries(tmp_path, told), {}, {"row_length": 96, "micro_batch_rows": 2}, mixing={"epochs": 1}
    )
    page = shown(data, 5)
    assert "There is not a single sample" in page.text
    assert "skipped: answer_empty3100.0%" in page.text
    assert "silent" in page.text


def test_a_large_picture_keeps_to_its_bytes() -> None:
    noise = Image.frombytes("RGB", (512, 512), torch.randint(0, 256, (512 * 512 * 3,), dtype=torch.uint8).numpy())
    flat = Image.new("RGB", (512, 512), "#123456")
    assert inline_picture(flat, True, 16_000).startswith("data:image/png")
    assert len(inline_picture(noise, False, 20_000)) * 3 / 4 < 21_000
    assert inline_picture(noise, True, 200_000).startswith("data:image/jpeg")


# --- the command


@pytest.fixture
def arguments(sample_data: Path, tmp_path: Path) -> list[str]:
    return ["experiment=demo", "stage=finetune", f"data.root={sample_data}", f"out={tmp_path / 'page.html'}"]


def test_the_command_writes_the_page(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", *arguments, "n=9"]) == 0
    assert "9 samples" in capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(page.cards) == 9
    assert "stage finetune, model sphinx_sample" in page.text


def test_a_mixture_that_training_would_refuse_can_be_seen(arguments: list[str], tmp_path: Path) -> None:
    assert main(["show", *arguments, "stage=pretrain_real", "data.sources.text=null", "n=2"]) == 0
    assert "train.py would refuse this: data.sources has no text-only source" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["show", "n=0"], "n=0 must be 1 to 1000"),
        (["show", "n=many"], "n=many must be a whole number"),
        (["show", "out=NOWHERE/page.html"], "there is no folder NOWHERE"),
        (["show", "out=."], "out=. is a folder"),
        (["show", "--n=3"], "n=3"),
        (["show", "help"], "'help' is neither name=value nor ~name"),
        (["show", "data.wrong=1"], "data.wrong"),
        (["show", "stage=none_such"], "none_such"),
        (["show", "data.root=NOWHERE"], "NOWHERE"),
        (["show", "data.sources.ocr.path=NOWHERE.json"], "source 'ocr': there is no file"),
        (["show", "model.vision=null"], "the model has no vision part"),
        (["shwo"], "unknown command 'shwo': did you mean 'show'?"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([given[0], *arguments, *given[1:]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "page.html").exists()


def test_usage_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "show" in capsys.readouterr().out
    assert main([]) == 2
    assert "show" in capsys.readouterr().err
