"""evaluate.py from end to end, with a random model and a handmade test set."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import openpyxl
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.cli.evaluate import Asking, flat, log_to_wandb
from sphinx_pl.data.answer_parsing import normalise
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.records import read_records
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.evaluation.benchmarks.detection_ocr_pose import DetectionBenchmark
from sphinx_pl.evaluation.benchmarks.mme import SUBTASKS
from sphinx_pl.evaluation.compare import compare
from sphinx_pl.evaluation.metrics import estimate
from sphinx_pl.evaluation.report.page import check_page
from sphinx_pl.evaluation.rescore import rescore
from sphinx_pl.evaluation.results import read_predictions
from sphinx_pl.evaluation.runner import Prediction, evaluate
from sphinx_pl.models.config import DecoderConfig, SphinxConfig, VisionConfig
from sphinx_pl.models.encoders.clip import ClipViTConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.settings.evaluate import EvaluateConfig
from sphinx_pl.utils.config import pick
from sphinx_pl.utils.errors import UserError
from tests.callbacks.test_wandb import finished_run
from tests.evaluation.benchmarks.vqa_files import CHART, FILES, write
from tests.evaluation.official import mme_scores
from tests.scripts import Script, run_script

ROOT = Path(__file__).parents[2]
ANSWERS = ("blue", "Yes"), ("red", "No")
CORPUS = ["how many objects are there answer the question using a single word or phrase", "where is the red digit"] * 50
PROCESSOR = {"system": "", "decimals": 2, "max_length": 256}


def tiny_config() -> SphinxConfig:
    clip = ClipViTConfig(image_size=32, patch_size=16, width=16, layers=1, heads=2)
    vision = VisionConfig(image_size=32, encoders={"clip": clip})
    decoder = DecoderConfig(
        vocab_size=320, width=32, layers=2, heads=2, kv_heads=1, ffn_width=64, max_positions=512, tie_embeddings=True
    )
    return SphinxConfig(name="tiny", decoder=decoder, vision=vision)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer, a checkpoint of random weights, six questions about three images, and one
    without an image file.
    """
    import sentencepiece

    folder = tmp_path_factory.mktemp("world")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    torch.manual_seed(0)
    config = tiny_config()
    weights = Sphinx(config).state_dict()
    tokenizer = folder / "tokenizer.model"
    write_checkpoint(folder / "checkpoint", weights, config.to_dict(), PROCESSOR, tokenizer, {"stage": "none"})
    entries = []
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(folder / f"{i}.png")
        common = {"image": f"{i}.png", "width": 40, "height": 30, "meta": {"domain": "real" if i else "synthetic"}}
        entries.append(common | {"id": f"q{i}", "task": "short_vqa", "question": "How many?", "answer": str(i)})
        regions = [{"box": [5 * i, 5, 5 * i + 10, 20], "label": "it"}]
        entries.append(common | {"id": f"r{i}", "task": "rec", "question": "the digit", "regions": regions})
    entries.append({"id": "x", "image": "gone.png", "task": "caption", "answer": "a digit"})
    (folder / "test.json").write_text(json.dumps(entries))
    return folder


def command(world: Path, *overrides: str) -> list[str]:
    source = f"{{kind: instructions, path: {world / 'test.json'}}}"
    # The key is deleted first, since a dictionary given for an existing key is merged into it.
    arguments = [
        "~data.sources",
        f"+data.sources={{tasks: {source}}}",
        f"hydra.run.dir={world / 'run'}",
        "device=cpu",
        *overrides,
    ]
    tests = [] if any("data.test=" in override for override in overrides) else [f"++data.test={{tasks: {source}}}"]
    return [str(ROOT / "evaluate.py"), *tests, *arguments]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def run(world: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    # The working folder is not the repository, whose sample data may hold a benchmark's files.
    return run_script(command(world, *overrides), world, ENVIRONMENT, ranks=ranks)


def test_evaluate_writes_predictions_and_results(world: Path) -> None:
    out = world / "out" / "a folder whose name alone is longer than the eighty columns of a narrow terminal"
    process = run(world, f"checkpoint={world / 'checkpoint'}", f"out={out}", f"report={world / 'r.html'}")
    assert process.returncode == 0, process.stderr
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert sorted(p["key"] for p in predictions) == sorted({p["key"] for p in predictions})
    assert {(p["task"], p["domain"]) for p in predictions} == {
        (task, domain) for task in ("short_vqa", "rec") for domain in ("real", "synthetic")
    }
    results = json.loads((out / "results.json").read_text())
    assert results["skipped"] == {"image_missing": 1}
    rows = {(row["task"], row["domain"]): row for row in results["rows"]}
    assert rows["short_vqa", ""]["n"] == 3
    assert rows["short_vqa", "real"]["n"] == 2
    # One constant is right for one of the three counts; a random model is never right.
    assert rows["short_vqa", ""]["baselines"]["constant"] == pytest.approx(1 / 3)
    assert rows["short_vqa", ""]["baseline_kind"] == "constant"
    assert set(rows["rec", ""]["baselines"]) == {"constant", "shuffled"}
    assert "short_vqa" in process.stdout
    # in one piece
    assert f"Results: {out / 'results.json'}\nReport: {world / 'r.html'}\n" in process.stdout
    assert (world / "r.html").read_text().count("<article") == 6
    assert "image_missing 1" in process.stdout


def test_benchmarks_are_scored_or_written_for_their_server(world: Path) -> None:
    root = world / "benchmarks"
    charts, vizwiz = root / "chartqa" / "ChartQA Dataset", root / "vizwiz"
    other = CHART | {"imgname": "gone.png"}
    write(charts, {"test/test_human.json": [CHART, other, 5], "test/test_augmented.json": [CHART | {"label": "Yes"}]})
    write(vizwiz, FILES["vizwiz"]["test"])
    for image in (charts / "test" / "png" / CHART["imgname"], vizwiz / "test" / "VizWiz_test_1.jpg"):
        image.parent.mkdir(parents=True)
        Image.new("RGB", (30, 40), (0, 80, 0)).save(image)
    out = world / "asked"
    options = f"checkpoint={world / 'checkpoint'}", f"out={out}", f"benchmark.root={root}"
    process = run(world, *options, "benchmarks=[chartqa,vizwiz_test]")
    assert process.returncode == 0, process.stderr
    results = json.loads((out / "results.json").read_text())
    chart, hidden = results["benchmarks"]
    assert (chart["name"], chart["n"], chart["lost"]) == ("chartqa", 2, {"entry_malformed": 1, "image_missing": 1})
    assert [(value["measure"], value["category"]) for value in chart["values"]] == [
        ("relaxed accuracy", part) for part in ("", "augmented", "human")
    ]
    assert (hidden["name"], hidden["n"], hidden["values"]) == ("vizwiz_test", 1, [])
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    predictions_by_key = {prediction["key"]: prediction["prediction"] for prediction in predictions}
    assert set(predictions_by_key) == {"chartqa/human-0", "chartqa/augmented-0", "vizwiz_test/VizWiz_test_1.jpg"}
    submission = json.loads((out / "submission_vizwiz_test.json").read_text())
    assert [row["image"] for row in submission] == ["VizWiz_test_1.jpg"]
    assert submission[0]["answer"] == normalise(predictions_by_key["vizwiz_test/VizWiz_test_1.jpg"])
    assert "submission_vizwiz_test.json: 1 answers" in process.stdout


def test_points_average_precision_and_images_in_a_table(world: Path) -> None:
    """A random model answers MME, detection and MMBench, and its answers are scored again."""
    root, out = world / "more", world / "more_asked"
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (0, 0, 90)).save(picture, "png")
    for subtask in SUBTASKS:
        folder = root / "mme" / subtask
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(picture.getvalue())
        questions = [f"Is it {what}? Please answer yes or no.\t{answer}\n" for what, answer in ANSWERS]
        (folder / "a.txt").write_text("".join(questions))
    region = {"label": "digit", "box": [5, 5, 20, 20]}
    scenes = [
        {"image": f"{i}.png", "width": 40, "height": 30, "task": "detection", "question": "digit", "regions": [region]}
        for i in (*range(3), 9)
    ]
    (world / "scenes.json").write_text(json.dumps(scenes))
    table = "index\tquestion\tA\tB\timage\tcategory\n3\tWhich?\tred\tblue\t{}\tcolour\n"
    (root / "mmbench").mkdir()
    image = base64.b64encode(picture.getvalue()).decode()
    (root / "mmbench" / "mmbench_test_en_20231003.tsv").write_text(table.format(image))
    options = f"checkpoint={world / 'checkpoint'}", f"out={out}", f"benchmark.root={root}"
    detection = f"benchmark.detection.src={world / 'scenes.json'}", f"benchmark.detection.images={world}"
    process = run(world, *options, *detection, "benchmarks=[mme,detection,mmbench_test]")
    assert process.returncode == 0, process.stderr
    results = json.loads((out / "results.json").read_text())
    mme, boxes, hidden = results["benchmarks"]
    assert (mme["n"], boxes["n"], hidden["n"]) == (28, 3, 2)
    assert boxes["lost"] == {"image_missing": 1}
    lines = (out / "predictions.jsonl").read_text().splitlines()
    predictions = [Prediction.from_dict(json.loads(line)) for line in lines]
    points = [(p.topic, p.key.rpartition("-")[0], p.score == 1) for p in predictions if p.benchmark == "mme"]
    values = {(v["measure"], v["category"]): v["value"] for v in mme["values"]}
    assert values["perception", ""] == pytest.approx(mme_scores(points).perception)
    assert {category for _, category in values} == {"", *SUBTASKS}
    detections = [p for p in predictions if p.benchmark == "detection"]
    suite = DetectionBenchmark(world / "scenes.json")
    assert [v["value"] for v in boxes["values"]] == [estimate(m.prepare(detections)).value for m in suite.metrics]
    assert len((out / "mme" / "OCR.txt").read_text().splitlines()) == 2
    sheet = openpyxl.load_workbook(out / "submission_mmbench_test_en.xlsx").active
    assert [row[0] for row in sheet.iter_rows(min_row=2, values_only=True)] == [3, 1_000_003]
    assert hidden["values"] == []


def test_a_mixture_is_reweighted_by_bad_cases(world: Path) -> None:
    arguments = [f"checkpoint={world / 'checkpoint'}", f"out={world / 'lean'}", "then=mixture", "shuffled=false"]
    process = run(world, *arguments, f"report={world / 'lean.html'}")
    assert process.returncode == 0, process.stderr
    text = (world / "lean" / "mixture.yaml").read_text()
    sources = yaml.safe_load(text)["sources"]
    # The command line changes the sources of the mixture's file, so all of them are here.
    assert sources == {"tasks": {"kind": "instructions", "path": str(world / "test.json"), "weight": 1.0}}
    lean = json.loads((world / "lean" / "results.json").read_text())["mixture"]
    assert {rate["task"]: rate["n"] for rate in lean["rates"]} == {"short_vqa": 3, "rec": 3}
    holds = {item["task"]: item["share"] for item in lean["sources"][0]["holds"]}
    assert holds == pytest.approx({"short_vqa": 3 / 7, "rec": 3 / 7, "caption": 1 / 7})
    assert "What to train on next" in (world / "lean.html").read_text()
    assert "Reweighted mixture" in process.stdout
    (world / "lean" / "mixture.yaml").write_text("sources: {}\n")
    second = run(world, *arguments, "overwrite=true")
    assert second.returncode == 2  # before any question: the answers still exist
    assert "evaluate.py did not write it" in second.stderr
    assert list((world / "lean" / "answers").iterdir())


def test_a_mistake_is_answered_in_one_line(world: Path) -> None:
    process = run(world, f"checkpoint={world / 'checkpoint'}", "test=[task]")
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert (
        process.stderr.strip().splitlines()[-1]
        == "error: data.test has no source 'task': did you mean 'tasks'? known: tasks"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "checkpoint=FOLDER"),
        ({"checkpoint": "x", "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"checkpoint": "x", "limit": 0}, "limit=0 must be at least 1"),
        ({"checkpoint": "x", "precision": "fp16"}, "precision='fp16'"),
        ({"checkpoint": "x", "then": "sleep"}, "then=sleep must be null or mixture"),
        ({"checkpoint": "x", "then": "mixture", "benchmarks": ["pope"]}, "then=mixture needs test sources"),
        ({"checkpoint": "x", "mixture_out": "a.yaml"}, "set both keys"),
        ({"checkpoint": "x", "reweighting": {"strength": 2}}, "reweighting.strength=2.0 must be 0 to 1"),
        ({"checkpoint": "x", "reweighting": {"bound": 0.5}}, "bound=0.5"),
    ],
)
def test_keys_are_checked_before_anything_is_read(keys: dict[str, object], message: str) -> None:
    defaults = OmegaConf.structured(EvaluateConfig)
    with pytest.raises(UserError, match=message):
        pick(EvaluateConfig, OmegaConf.merge(defaults, keys))


def test_sources_in_groups_are_read_as_well(world: Path) -> None:
    source = {"kind": "instructions", "path": str(world / "test.json"), "tasks": ["rec"]}
    group = {"sources": {"inner": source, "off": None}, "temperature": 2}
    records, lost = read_records({"group": group, "plain": source, "gone": None}, "sources", at_most=2)
    assert [record.key.partition("/")[0] for record in records] == ["group.inner"] * 2 + ["plain"] * 2
    assert not lost


def test_order_batches_and_shown_images(world: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config()
    processor = Processor.from_dict(PROCESSOR, world / "tokenizer.model", config)
    model = Sphinx(config)
    refs = [(ImageRef(str(world / f"{i}.png")),) for i in (0, 2)]
    texts = ["How many?", "How many red ones are there, all in all?", "What?"]
    records = [Record(str(i), "short_vqa", refs[i % 2], question=text, answer="1") for i, text in enumerate(texts)]
    one = evaluate(model, processor, records, batch_size=1, progress=False)
    several = evaluate(model, processor, records, batch_size=3, progress=False)
    assert [p.key for p in one] == ["0", "1", "2"]
    assert one == several  # The padding of a batch changes no answer.
    swapped = {record.key: refs[1 - i % 2] for i, record in enumerate(records)}
    predictions = evaluate(model, processor, records, images=swapped, progress=False)
    assert [p.images for p in predictions] == [refs[1], refs[0], refs[1]]
    assert [p.question for p in predictions] == [p.question for p in one]


@pytest.fixture(scope="module")
def pope(world: Path) -> list[str]:
    """Return forty questions in the format of a benchmark, and the overrides that ask them."""
    entries = [
        {
            "question_id": i,
            "image": f"{i % 3}.png",
            "text": f"Is there {'a dog ' * (i % 7)}in the image?",
            "label": ["yes", "no"][i % 2],
        }
        for i in range(40)
    ]
    (world / "coco_pope_random.json").write_text("\n".join(map(json.dumps, [*entries, {"text": "no label"}])))
    benchmark = f"{{kind: pope, split: random, src: {world}}}"
    return ["benchmarks=[dogs]", f"+benchmark.dogs={benchmark}", f"checkpoint={world / 'checkpoint'}", "batch_size=2"]


@pytest.fixture(scope="module")
def whole(world: Path, pope: list[str]) -> Path:
    """Return the folder of an evaluation without interruption."""
    process = run(world, *pope, f"out={world / 'whole'}")
    assert process.returncode == 0, process.stderr
    assert "dogs" in process.stdout
    assert "Skipped questions of dogs: entry_malformed 1" in process.stdout
    return world / "whole"


def same(one: Path, other: Path) -> bool:
    return (one / "predictions.jsonl").read_bytes() == (other / "predictions.jsonl").read_bytes()


def test_a_benchmark_is_asked_alone_and_summed_up(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert not results["rows"]
    (result,) = results["benchmarks"]
    assert (result["kind"], result["n"], result["lost"]) == ("pope", 40, {"entry_malformed": 1})
    assert [value["measure"] for value in result["values"]] == ["accuracy", "precision", "recall", "f1", "yes"]
    lines = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"dogs/{i}" for i in range(40)]
    assert all(line["record"]["answer"] in ("yes", "no") for line in lines)
    assert rescore(whole) == 0


def test_a_pattern_skips_benchmarks_without_files_and_says_so(world: Path, pope: list[str]) -> None:
    (world / "pope").mkdir()
    (world / "pope" / "coco_pope_random.json").write_bytes((world / "coco_pope_random.json").read_bytes())
    out, report = world / "all", world / "all.html"
    where = [f"benchmark.root={world}", f"benchmark.pope_random.images={world}"]
    arguments = ['benchmarks=["*"]', *where, "limit=2", f"out={out}", f"checkpoint={world / 'checkpoint'}"]
    process = run(world, *arguments, f"benchmark.pope_popular.images={world}", f"report={report}")
    assert process.returncode == 0, process.stderr
    results = json.loads((out / "results.json").read_text())
    assert [result["name"] for result in results["benchmarks"]] == ["pope_random"]
    assert "coco_pope_popular.json" in results["left_out"]["pope_popular"]
    assert "root" not in results["left_out"]
    assert "Skipped: mme: " in process.stdout
    named = run(
        world, "benchmarks=[pope_random,mme]", *where, f"out={world / 'x'}", f"checkpoint={world / 'checkpoint'}"
    )
    assert named.returncode == 2
    assert "mme" in named.stderr
    folder = run(world, *arguments, f"report={world}")
    assert folder.returncode == 2
    assert f"report: '{world}' is a folder" in folder.stderr


def test_baselines_of_a_replaced_evaluation_are_deleted(world: Path) -> None:
    arguments = [f"checkpoint={world / 'checkpoint'}", f"out={world / 'again'}", "overwrite=true"]
    for more, baselines in (([], {"constant.jsonl", "shuffled.jsonl"}), (["shuffled=false", "constant=0"], set())):
        assert run(world, *arguments, *more).returncode == 0
        assert {file.name for file in (world / "again").glob("*.jsonl")} == baselines | {"predictions.jsonl"}


def test_a_killed_evaluation_resumes_with_the_same_result(world: Path, pope: list[str], whole: Path) -> None:
    out = world / "killed"
    answer_log = out / "answers" / "dogs.rank0.jsonl"
    with Path(os.devnull).open("w") as nowhere:
        process = Script(command(world, *pope, f"out={out}"), nowhere, nowhere, environment=ENVIRONMENT)
    while process.poll() is None and (not answer_log.exists() or answer_log.read_bytes().count(b"\n") < 4):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "results.json").exists()
    answered = answer_log.read_bytes().count(b"\n")
    assert 4 <= answered < 21  # a line for the settings, one for each of 20 batches
    resumed = run(world, *pope, f"out={out}")
    assert resumed.returncode == 0, resumed.stderr
    assert same(out, whole)
    assert answer_log.read_bytes().count(b"\n") == 21  # none was answered twice
    assert not compare(read_predictions(out), read_predictions(whole), {})[0].real


def test_two_processes_answer_the_same(world: Path, pope: list[str], whole: Path) -> None:
    out = world / "both"
    process = run(world, *pope, f"out={out}", ranks=2)
    assert process.returncode == 0, process.stderr
    assert same(out, whole)
    assert process.stdout.count("Results:") == 1
    lines = {path.name: path.read_bytes().count(b"\n") for path in (out / "answers").iterdir()}
    assert lines == {"dogs.rank0.jsonl": 11, "dogs.rank1.jsonl": 11}


def test_answers_with_other_settings_are_not_continued(world: Path, pope: list[str], whole: Path) -> None:
    process = run(world, *pope, f"out={whole}", "precision=bf16")
    assert process.returncode == 2
    assert process.stderr.strip().splitlines()[-1].startswith(f"error: '{whole / 'answers'}' holds answers with other")


def test_nothing_in_a_folder_is_replaced_by_default(world: Path, whole: Path) -> None:
    """Neither results of other questions nor answers with other settings are replaced.

    Both are refused before a model is loaded.
    """
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}

    def asking(**keys: object) -> Asking:
        settings = OmegaConf.structured(EvaluateConfig)
        return Asking(
            pick(EvaluateConfig, OmegaConf.merge(settings, {"checkpoint": str(world / "checkpoint"), **keys})), whole
        )

    asking().check_out(["dogs"])
    asking().check_out(["dogs", "cats"])
    with pytest.raises(UserError, match="holds results of dogs, which are not asked now"):
        asking().check_out(["tasks", "cats"])
    with pytest.raises(UserError, match=r"answers with other settings \(ranking\)"):
        asking(ranking=True).check_out(["dogs"])
    asking(overwrite=True, ranking=True).check_out(["cats"])
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_report_replaces_only_a_page(tmp_path: Path) -> None:
    for name, content in (("notes.md", "# Notes"), ("page.html", "<!DOCTYPE html><p>"), ("empty.html", "")):
        (tmp_path / name).write_text(content)
    check_page(tmp_path / "page.html", "report")
    check_page(tmp_path / "empty.html", "report")
    check_page(tmp_path / "new.html", "report")
    with pytest.raises(UserError, match=r"report: '.*notes.md' exists and is not a page"):
        check_page(tmp_path / "notes.md", "report")


def test_weights_and_biases_get_every_number(whole: Path, tmp_path: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    log_to_wandb({"mode": "offline", "dir": str(tmp_path), "project": "sphinx"}, results)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    run = finished_run(file)
    assert run.config["batch_size"] == 2
    assert set(flat(results)) >= {f"dogs/{name}" for name in ("accuracy", "precision", "recall", "f1", "yes")} - {
        f"dogs/{value['measure']}" for value in results["benchmarks"][0]["values"] if value["value"] is None
    }
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/results_*.table.json")
    assert dict(json.loads(table.read_text())["data"]) == flat(results)


def test_a_benchmark_without_files(world: Path) -> None:
    wrong = [f"checkpoint={world / 'checkpoint'}", "benchmarks=[pope_random]", f"benchmark.root={world / 'gone'}"]
    process = run(world, *wrong)
    assert process.returncode == 2
    message = process.stderr.strip().splitlines()[-1]
    assert message.startswith(f"error: pope: '{world / 'gone' / 'pope'}' does not exist")
    assert "https://github.com/AoiDragon/POPE" in message
