"""evaluate.py from end to end, on a random model and a hand-made test set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from evaluate import EvaluateConfig
from sphinx_pl.checkpoint.format import write_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.record import ImageRef, Record
from sphinx_pl.errors import UserError
from sphinx_pl.evaluation.asking import evaluate
from sphinx_pl.models.config import ClipViTConfig, DecoderConfig, SphinxConfig, VisionConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.typed import pick

ROOT = Path(__file__).parents[2]
CORPUS = ["how many objects are there answer the question using a single word or phrase", "where is the red digit"] * 50
PROCESSOR = {"system": "", "decimals": 2, "max_length": 256}


def tiny_config() -> SphinxConfig:
    clip = ClipViTConfig(image_size=32, patch_size=16, width=16, layers=1, heads=2)
    vision = VisionConfig(image_size=32, clip=clip, convnext=None, dinov2=None, qformer=None)
    decoder = DecoderConfig(
        vocab_size=320, width=32, layers=2, heads=2, kv_heads=1, ffn_width=64, max_positions=512, tie_embeddings=True
    )
    return SphinxConfig(name="tiny", decoder=decoder, vision=vision)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a checkpoint of random weights, six questions about three images, and one without an image file."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("world")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        byte_fallback=True,
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


def run(world: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    source = f"{{kind: instructions, path: {world / 'test.json'}}}"
    # Deleted first: a dictionary given for an existing key is merged into it.
    arguments = [
        "~data.sources",
        f"+data.sources={{tasks: {source}}}",
        f"hydra.run.dir={world / 'run'}",
        "device=cpu",
        *overrides,
    ]
    tests = [] if any("data.test=" in override for override in overrides) else [f"++data.test={{tasks: {source}}}"]
    command = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        *tests,
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=240)


def test_evaluate_writes_predictions_and_results(world: Path) -> None:
    done = run(world, f"checkpoint={world / 'checkpoint'}", f"out={world / 'out'}", f"report={world / 'r.html'}")
    assert done.returncode == 0, done.stderr
    predictions = [json.loads(line) for line in (world / "out" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(p["key"] for p in predictions) == sorted({p["key"] for p in predictions})
    assert {(p["task"], p["domain"]) for p in predictions} == {
        (task, domain) for task in ("short_vqa", "rec") for domain in ("real", "synthetic")
    }
    results = json.loads((world / "out" / "results.json").read_text())
    assert results["skipped"] == {"image_missing": 1}
    rows = {(row["task"], row["domain"]): row for row in results["rows"]}
    assert rows["short_vqa", ""]["n"] == 3
    assert rows["short_vqa", "real"]["n"] == 2
    # One constant gets one of the three different counts; a random model gets nothing.
    assert rows["short_vqa", ""]["baselines"]["constant"] == pytest.approx(1 / 3)
    assert rows["short_vqa", ""]["baseline_kind"] == "constant"
    assert set(rows["rec", ""]["baselines"]) == {"constant", "shuffled"}
    assert "short_vqa" in done.stdout
    assert (world / "r.html").read_text().count("<article") == 6
    assert "image_missing 1" in done.stdout


def test_a_mixture_leans_towards_what_fails(world: Path) -> None:
    arguments = [f"checkpoint={world / 'checkpoint'}", f"out={world / 'lean'}", "then=mixture", "shuffled=false"]
    done = run(world, *arguments, f"report={world / 'lean.html'}")
    assert done.returncode == 0, done.stderr
    text = (world / "lean" / "mixture.yaml").read_text()
    sources = yaml.safe_load(text)["sources"]
    # The command line has other sources than the mixture's file, so they are all here.
    assert sources == {"tasks": {"kind": "instructions", "path": str(world / "test.json"), "weight": 1.0}}
    lean = json.loads((world / "lean" / "results.json").read_text())["mixture"]
    assert {rate["task"]: rate["n"] for rate in lean["rates"]} == {"short_vqa": 3, "rec": 3}
    holds = {held["task"]: held["share"] for held in lean["sources"][0]["holds"]}
    assert holds == pytest.approx({"short_vqa": 3 / 7, "rec": 3 / 7, "caption": 1 / 7})
    assert "What to train on next" in (world / "lean.html").read_text()
    assert "Leaned mixture" in done.stdout
    (world / "lean" / "mixture.yaml").write_text("sources: {}\n")
    again = run(world, *arguments, "overwrite=true")
    assert again.returncode == 2  # before anything is asked: the answers are still there
    assert "was not written by evaluate.py" in again.stderr
    assert list((world / "lean" / "answers").iterdir())


def test_a_mistake_is_answered_in_one_line(world: Path) -> None:
    done = run(world, f"checkpoint={world / 'checkpoint'}", "test=[task]")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "error: data.test has no source 'task': did you mean 'tasks'?"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "checkpoint=FOLDER"),
        ({"checkpoint": "x", "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"checkpoint": "x", "limit": 0}, "limit=0 must be at least 1"),
        ({"checkpoint": "x", "precision": "fp16"}, "precision='fp16'"),
        ({"checkpoint": "x", "then": "sleep"}, "then=sleep must be null or mixture"),
        ({"checkpoint": "x", "then": "mixture", "benchmarks": ["pope"]}, "then=mixture needs test sources"),
        ({"checkpoint": "x", "mixture_out": "a.yaml"}, "give both"),
        ({"checkpoint": "x", "lean": {"strength": 2}}, "lean.strength=2.0 must be 0 to 1"),
        ({"checkpoint": "x", "lean": {"bound": 0.5}}, "bound=0.5"),
    ],
)
def test_keys_are_checked_before_anything_is_read(keys: dict[str, object], message: str) -> None:
    defaults = OmegaConf.structured(EvaluateConfig)
    with pytest.raises(UserError, match=message):
        pick(EvaluateConfig, OmegaConf.merge(defaults, keys))


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
    assert one == several  # the padding of a batch changes no answer
    swapped = {record.key: refs[1 - i % 2] for i, record in enumerate(records)}
    shown = evaluate(model, processor, records, images=swapped, progress=False)
    assert [p.images for p in shown] == [refs[1], refs[0], refs[1]]
    assert [p.question for p in shown] == [p.question for p in one]
