"""The report: complete, self-contained and escaped; the parts that draw, against pixels and numbers worked by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageColor

from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.drawing import GIVEN, PREDICTED, TRUE, draw, to_picture
from sphinx_pl.data.schema import ImageRef, Record, Region
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.report.charts import Series, line_chart, smooth, ticks
from sphinx_pl.evaluation.report.gallery import DRAWN, MORE, WORST, cards, choose, sections
from sphinx_pl.evaluation.report.inputs import find_inputs, read_run
from sphinx_pl.evaluation.report.page import main
from sphinx_pl.evaluation.report.summary import summarise
from sphinx_pl.evaluation.runner import score_answer
from tests.examples import EXAMPLES

GEOMETRY = Coordinates(decimals=2)
VOID = {"meta", "img", "br", "rect", "path", "circle"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.images = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


SOURCES = "real: {kind: image_text}, text: {kind: text}"


def write_run(folder: Path, steps: int = 200, start: float = 4.0, sources: str = SOURCES) -> None:
    """A metrics.csv as `MetricsCSV` writes it."""
    folder.mkdir(parents=True)
    lines = ["step,train/loss,train/loss_task/rec,val/loss/text,val/loss/real"]
    lines.append(f"0,,,{start},{start + 0.5}")
    for step in range(1, steps + 1):
        loss = 1 + (start - 1) * 0.98**step + 0.2 * ((step * 7919) % 13 - 6) / 13
        held_out = f"{loss + 0.1:.4f},{loss + 0.4:.4f}" if step % 50 == 0 else ","
        lines.append(f"{step},{loss:.4f},{loss + 0.3:.4f},{held_out}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(f"model: {{name: tiny}}\ndata: {{sources: {{{sources}}}}}\n")


def write_evaluation(folder: Path, image: Path) -> None:
    folder.mkdir(parents=True)
    refs, size = (ImageRef(str(image)),), ((64, 64),)
    rec = Record("0", "rec", refs, size, question="the red one", regions=(Region((8, 8, 32, 32), "red"),))
    vqa = Record("1", "short_vqa", refs, size, question="<b>What</b> & why?", answer="<script>alert(1)</script>")
    lost = Record("2", "short_vqa", (ImageRef(str(image) + ".gone"),), size, question="Lost?", answer="yes")
    predictions = [
        score_answer(rec, "[0.20,0.20,0.60,0.60]", GEOMETRY, refs),
        score_answer(vqa, "<script>alert(1)</script>", GEOMETRY, refs),
        score_answer(lost, "no", GEOMETRY, lost.images),
    ]
    rows = summarise(predictions, {"constant": predictions})
    results = {
        "checkpoint": "x/final",
        "decimals": 2,
        "image_size": 64,
        "metrics": {},
        "rows": [r.to_dict() for r in rows],
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p.to_dict()) + "\n" for p in predictions))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_run(tmp_path / "real")
    write_run(tmp_path / "real_notext", steps=100, start=3.0, sources="real: {kind: image_text}")
    picture = Image.new("RGB", (64, 64), "white")
    picture.save(tmp_path / "image.png")
    write_evaluation(tmp_path / "evaluation", tmp_path / "image.png")
    curve = {"betas": [0, 0.5, 1], "losses": {"a": [2, 1, 3], "b": [4, 2, 3]}, "mean": [3, 1.5, 3.0]}
    (tmp_path / "curve.json").write_text(json.dumps(curve))
    return tmp_path


def test_whole_report(inputs: Path) -> None:
    out = inputs / "report.html"
    runs = [f"--run={name}={inputs / name}" for name in ("real", "real_notext")]
    assert main([f"--out={out}", *runs, f"--mix={inputs}", "--evaluation", str(inputs / "evaluation")]) == 0
    html = out.read_text()
    page = Page(html)
    assert page.open == []
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"<(link|iframe|object)|src=(?!\"data:)|url\(|@import", html)
    assert "<script>alert" not in html
    assert "<script>alert(1)</script>" in page.text  # shown, not run
    assert "<b>What</b> & why?" in page.text
    assert page.images == 2  # the third one's file is gone, which is said
    assert "1 picture is left out" in page.text
    assert "β = 0.50, 1.5000" in page.text.replace("\n", " ")
    assert "1.5000 below the synthetic end" in page.text
    assert "4.000 step 0" in page.text  # text before the stage
    after = {run: dict(read_run(run, inputs / run).columns["val/loss/text"]) for run in ("real", "real_notext")}
    last = after["real_notext"][100]
    assert f"without3.000 step 0{last:.3f} step 100{last - 3:+.3f}{after['real'][100]:.3f}" in page.text
    assert not list(inputs.glob("*.tmp"))


def prediction(key: str, score: float, task: str = "vqa", topic: str = "", **more: Any) -> dict[str, Any]:
    about = {"key": key, "task": task, "topic": topic, "domain": "", "score": score, "parsed": True, "images": []}
    return about | {"question": "Q?", "answer": "true", "prediction": "said", "benchmark": "", "metric": "exact"} | more


def test_the_worst_come_first_and_every_category_gets_its_turn() -> None:
    predictions = [prediction(f"a{i}", 0.0, topic="a") for i in range(50)]
    predictions += [prediction("b0", 0.0, topic="b"), prediction("c0", 0.3, topic="c"), prediction("r", 1.0)]
    predictions += [
        prediction("d0", 0.1, task="rec"),
        prediction("d1", 0.4, task="rec"),
        prediction("d2", 0.9, task="rec"),
    ]
    keys = [items["key"] for items in choose(predictions, wrong=4, right=1, at_most=99)]
    assert keys[:2] == ["a6", "d0"]  # of 50 equal ones the first eighth's middle
    assert "b0" in keys[:3]
    assert "c0" not in keys  # worse ones are there
    assert keys[-2:] == ["r", "d2"]
    assert len(keys) == 8
    assert [items["key"] for items in choose(predictions, wrong=4, right=1, at_most=3)] == keys[:3]


def test_the_first_answers_are_drawn_whatever_they_score() -> None:
    """Three of four are right, and so are about as many of those that are shown first."""
    predictions = [prediction(f"{task}{i}", float(i % 4 > 0), task=task) for task in ("vqa", "rec") for i in range(80)]
    result = sections(predictions, drawn=20, wrong=8, right=3, at_most=99)
    headings = [heading for heading, _ in result]
    assert list(dict.fromkeys(headings)) == [DRAWN, WORST, MORE]
    assert headings == sorted(headings, key=[DRAWN, WORST, MORE].index)
    assert [headings.count(heading) for heading in (DRAWN, WORST, MORE)] == [40, 16, 6]
    assert 25 <= sum(items["score"] for heading, items in result if heading == DRAWN) <= 35
    assert {items["score"] for heading, items in result if heading == WORST} == {0}
    assert len({items["key"] for _, items in result}) == len(result)  # nothing twice
    # What is drawn does not follow from the scores.
    turned = [items | {"score": 1 - items["score"]} for items in predictions]
    repeat = sections(turned, drawn=20, wrong=8, right=3, at_most=99)
    drawn, drawn_again = ([one["key"] for how, one in part if how == DRAWN] for part in (result, repeat))
    assert drawn == drawn_again
    assert sections(predictions, drawn=20, wrong=8, right=3, at_most=5) == result[:5]
    html = cards([p for _, p in result], 64, GEOMETRY, headings)
    assert html.index(f"<h3>{DRAWN}</h3>") < html.index("<article") < html.index(f"<h3>{WORST}</h3>")


def test_answers_are_told_apart_by_benchmark(tmp_path: Path) -> None:
    items = [
        prediction("pope_random/1", 0.0, benchmark="pope", topic="<script>x</script>", parsed=False),
        prediction("pope_random/2", 1.0, benchmark="pope", topic="y"),
        prediction("tasks/1", 0.0, task="<script>z</script>", domain="<script>d</script>"),
    ]
    items.append(prediction("mm_vet/1", 0.0, benchmark="mm_vet", metric=""))
    html = cards(items, 64, GEOMETRY)
    assert Page(html).open == []
    assert "<script>" not in html
    assert "scored elsewhere</span>" in html
    assert html.count('data-task="pope_random"') == 2
    assert re.findall('data-outcome="([a-z]+)"', html) == ["unparsed", "right", "wrong", "elsewhere"]
    assert items[-1] in choose(items, wrong=0, right=1, at_most=9)
    assert items[-1] not in choose(items, wrong=9, right=0, at_most=9)
    assert html.count("<optgroup") == 1  # the task has one category


def test_pictures_of_a_page_share_a_bounded_size(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")
    image = dataclasses.asdict(ImageRef(str(tmp_path / "noise.png")))
    few, many = ([prediction(str(i), 0.0, images=[image]) for i in range(count)] for count in (2, 300))
    assert len(cards(few, 256, GEOMETRY)) / 2 > 30_000
    assert len(cards(many, 256, GEOMETRY)) < 1.4 * 7_500_000


@pytest.mark.long
def test_a_browser_filters_answers_and_runs_nothing_from_them(tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    evil = "<script>window.hacked=1</script><img src=x onerror='hacked=1'>"
    predictions = [prediction(f"p/{i}", 0.0, benchmark="pope", topic=f"t{i % 2}{evil}", answer=evil) for i in range(30)]
    predictions += [prediction("s/1", 1.0, task="rec"), prediction("s/2", 0.0, task="rec", parsed=False)]
    (tmp_path / "results.json").write_text(
        json.dumps({"rows": [], "decimals": 2, "image_size": 64, "checkpoint": evil})
    )
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions))
    out = tmp_path / "page.html"
    assert main([f"--out={out}", "--wrong=30", "--evaluation", str(tmp_path)]) == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.goto(out.as_uri())
        visible, output = page.locator("article:visible"), page.locator("output")
        expect(visible).to_have_count(24)
        expect(output).to_have_text("24 of 32")
        page.click("text=Show more")
        expect(visible).to_have_count(32)
        page.select_option("select[name=task]", "rec")
        expect(output).to_have_text("2 of 2")
        page.select_option("select[name=outcome]", "unparsed")
        expect(output).to_have_text("1 of 1")
        page.select_option("select[name=task]", "p")
        expect(output).to_contain_text("none of these")
        page.select_option("select[name=outcome]", "wrong")
        page.select_option("select[name=part]", label=f"t1{evil}")
        expect(output).to_have_text("15 of 15")
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        browser.close()


@pytest.mark.parametrize("argument", ["--wrong=-1", "--answers=-5"])
def test_counts_are_not_negative(tmp_path: Path, argument: str) -> None:
    assert main([f"--out={tmp_path / 'r.html'}", argument]) == 2
    assert not (tmp_path / "r.html").exists()


def test_evaluations_of_one_name_are_told_apart(inputs: Path) -> None:
    write_evaluation(inputs / "b" / "evaluation", inputs / "image.png")
    folders = [str(inputs / "evaluation"), str(inputs / "b" / "evaluation")]
    assert main([f"--out={inputs / 'two.html'}", "--evaluation", *folders]) == 0
    text = Page((inputs / "two.html").read_text()).text
    assert "b/evaluation: score" in text
    assert f"{inputs.name}/evaluation: score" in text


def test_nothing_given_is_said_and_no_crash(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    missing = str(tmp_path / "nothing")
    assert main([f"--out={out}", f"--run=real={missing}"]) == 2
    assert main([f"--out={out}", "--evaluation", missing]) == 2
    assert not out.exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([f"--out={out}", f"--run=real={empty}", f"--mix={missing}"]) == 0
    text = Page(out.read_text()).text
    for sentence in (
        "No metrics.csv",
        "There is no curve",
        "There are no results",
        "There are no predictions",
        "No run logged",
    ):
        assert sentence in text


def test_damaged_inputs_are_left_out_and_said(inputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("curve.json", "evaluation/predictions.jsonl", "real/config.yaml"):
        (inputs / name).write_bytes(b"{\xff")
    arguments = [f"--run=real={inputs / 'real'}", f"--mix={inputs}", "--evaluation", str(inputs / "evaluation")]
    assert main([f"--out={inputs / 'damaged.html'}", *arguments]) == 0
    left_out = [message for message in caplog.messages if "left out of the report" in message]
    assert len(left_out) == 3
    assert "There is no curve" in Page((inputs / "damaged.html").read_text()).text


def test_a_wrong_argument_is_answered_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--out={tmp_path / 'r.html'}", "--run=folder"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inputs_are_found_in_the_reports_folder(tmp_path: Path) -> None:
    for number, name in enumerate(("second", "first")):
        write_run(tmp_path / name)
        os.utime(tmp_path / name / "metrics.csv", (2 - number, 2 - number))
    (tmp_path / "mixed").mkdir()
    assert [run.name for run in find_inputs(tmp_path)[0]] == ["first", "second"]
    assert find_inputs(tmp_path)[1] is None
    (tmp_path / "mixed" / "curve.json").write_text("{}")
    assert find_inputs(tmp_path)[1] == tmp_path / "mixed"


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,perf/time_step,perf/tokens_per_s\n10,1,2,100\n20,1,3,200\n")
    sources = "{real: {kind: image_text}, chat: {kind: instructions, modality: text}, text: null}"
    (tmp_path / "config.yaml").write_text(f"stage: {{name: finetune}}\ndata: {{sources: {sources}}}\n")
    run = read_run("a_notext", tmp_path)
    # Ten steps of 2 s and ten of 3 s; 20 s at 100 and 30 s at 200 tokens per second.
    assert run.steps == 20
    assert (run.seconds, run.total("tokens"), run.total("images")) == (50, 8000, 0)
    assert (run.stage, run.sources, run.reads_text) == ("finetune", ["real", "chat"], True)
    (tmp_path / "config.yaml").unlink()
    assert (read_run("a_notext", tmp_path).stage, read_run("a_notext", tmp_path).reads_text) == ("a", False)


def test_a_step_that_was_logged_twice_counts_as_it_was_last(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,5\n2,4\n3,9\n3,3\n4,2\n")
    (tmp_path / "sweeps" / "a").mkdir(parents=True)
    (tmp_path / "sweeps" / "a" / "metrics.csv").write_text("step,train/loss\n9,9\n")
    assert read_run("r", tmp_path).columns["train/loss"] == [(1, 5), (2, 4), (3, 3), (4, 2)]


def test_the_last_loss_is_the_last_and_the_mean_is_called_one(tmp_path: Path) -> None:
    losses = [*[1.0] * 30, *[0.5] * 19, 0.041]
    lines = [f"{10 * step},{loss}" for step, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,train/loss", *lines]) + "\n")
    assert main([f"--out={tmp_path / 'report.html'}", f"--run=real={tmp_path}"]) == 0
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", (tmp_path / "report.html").read_text())
    row = dict(zip(cells[:8], cells[8:16], strict=True))
    assert row["last loss"] == "0.041"
    assert row["mean of the last 20"] == f"{(19 * 0.5 + 0.041) / 20:.3f}"
    assert row["steps"] == "500"


def test_smoothing_keeps_a_straight_line_and_averages_noise() -> None:
    line = [(float(x), 2.0 * x) for x in range(50)]
    assert [y for _, y in smooth(line, 0.2)][:45] == pytest.approx([y for _, y in line][:45])
    assert smooth(line, 0.2)[-1][1] == pytest.approx(98 - 5)  # the mean of the last six: 2 * 49 back to 2 * 44
    zigzag = [(float(x), float(x % 2)) for x in range(101)]
    assert smooth(zigzag, 0.2)[50][1] == pytest.approx(0.5, abs=0.05)  # a window of 21: 10 or 11 ones


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.52, 4) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert ticks(1, 1) == [1]


def test_chart_of_one_point_and_of_none() -> None:
    assert "circle" in line_chart([Series("a & b", [(0, 1)], dots=True)])
    assert "a &amp; b" in line_chart([Series("a & b", [(0, 1)], dots=True)])
    assert line_chart([Series("a", [])]) == ""


def test_boxes_are_drawn_where_the_text_says() -> None:
    picture = to_picture(torch.zeros(3, 64, 64, dtype=torch.uint8), scale=4)
    assert picture.size == (256, 256)
    answer, prediction, question = "[0.25,0.25,0.50,0.50]", "[0.60,0.60,0.90,0.90]", "Look at [0.00,0.70,0.20,1.00]."
    drawn = draw(picture, answer, prediction, GEOMETRY, question)
    at = {  # the left edge's middle: x1 * 255, (y1 + y2) / 2 * 255
        (64, 96): TRUE,
        (153, 191): PREDICTED,
        (0, 217): GIVEN,
        (2, 217): "#ffffff",  # the rim
    }
    for place, colour in at.items():
        assert drawn.getpixel(place) == ImageColor.getrgb(colour), place
    assert drawn.getpixel((96, 96)) == (0, 0, 0)  # nothing inside
    assert picture.getpixel((64, 96)) == (0, 0, 0)  # the picture itself is left as it was


def test_keypoints_are_dots_joined_by_limbs() -> None:
    black = Image.new("RGB", (200, 200))
    text = "<p>left knee</p>[0.20,0.20]<p>left ankle</p>[0.20,0.80]<p>nose</p>[0.80,0.50]"
    drawn = draw(black, "", text, GEOMETRY)
    colour = ImageColor.getrgb(PREDICTED)
    assert drawn.getpixel((40, 40)) == drawn.getpixel((160, 100)) == colour
    assert drawn.getpixel((40, 100)) == colour  # the shin
    assert drawn.getpixel((100, 75)) == (0, 0, 0)  # no limb between knee and nose
    assert draw(black, "no geometry", "[1,2,3", GEOMETRY).tobytes() == black.tobytes()


def test_every_task_has_its_cards_with_what_it_names_drawn(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), "white").save(tmp_path / "a.png")
    refs = (ImageRef(str(tmp_path / "a.png")),)
    records = [dataclasses.replace(record, key=task, images=refs) for task, record in EXAMPLES.items()]
    answers = [TASKS[record.task].turns(record, GEOMETRY)[-1].answer for record in records]
    predictions = [
        score_answer(record, answer, GEOMETRY, refs) for record, answer in zip(records, answers, strict=True)
    ]
    results = {"decimals": 2, "image_size": 50, "rows": [row.to_dict() for row in summarise(predictions)]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(p.to_dict()) + "\n" for p in predictions))
    assert main([f"--out={tmp_path / 'report.html'}", "--evaluation", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert page.images == len(TASKS)
    pictures = {
        task: re.search(rf'data-task="{task}".*?base64,([^"]*)"', html, re.DOTALL)[1]  # type: ignore[index]
        for task in TASKS
    }
    places = {task for task, picture in pictures.items() if picture != pictures["short_vqa"]}
    assert places == {
        *("rec", "reg", "grounded_caption", "grounded_vqa", "detection", "detection_all", "ocr", "layout", "pose"),
        "relation_detection",  # its places stand in the question
    }
