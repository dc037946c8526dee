"""lmms-eval itself, in an environment of its own, beside evaluate.py; and the data sets that it is given."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from sphinx_pl.data.converters.vsr import STATEMENT
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers.instruction_json import to_record
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.generation.assistant import Assistant, Dialog
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from tests.evaluation.lmms import sample_tasks as harness
from tests.generation.test_assistant import saved

LIMIT = 24


@pytest.fixture
def made(sample_data: Path, tmp_path: Path) -> Path:
    harness.make(sample_data, tmp_path / "made", LIMIT)
    return tmp_path / "made"


def rows(made: Path, name: str) -> list[dict[str, Any]]:
    [file] = (made / name).glob("data/test-*.parquet")
    items: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return items


def test_both_are_given_the_same_questions(made: Path) -> None:
    entries = json.loads((made / "questions.json").read_text())
    by_topic: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_topic.setdefault(entry["meta"]["topic"], []).append(entry)
    assert by_topic.keys() == {task for task in harness.METRICS if "ppl" not in task}
    for row, entry in zip(rows(made, "pope"), by_topic["pope_sample"], strict=True):
        assert (row["question"], row["answer"]) == (entry["question"], entry["answer"])
        assert row["image"]["bytes"] == Path(entry["image"]).read_bytes()
    for row, entry in zip(rows(made, "vsr"), by_topic["vsr_sample"], strict=True):
        assert STATEMENT.format(caption=row["caption"]) == entry["question"]
        assert row["label"] == (entry["answer"] == "yes")
    for row, entry in zip(rows(made, "seedbench"), by_topic["seedbench_sample"], strict=True):
        assert row[f"choice_{row['answer'].lower()}"] == entry["answer"]
    for row, entry in zip(rows(made, "refcoco"), by_topic["refcoco_bbox_rec_sample"], strict=True):
        x, y, width, height = row["bbox"]
        assert [x, y, x + width, y + height] == entry["regions"][0]["box"]
    asked = [question for row in rows(made, "ocrvqa") for question in row["questions"]]
    assert asked == [entry["question"] for entry in by_topic["ocrvqa_sample"]]
    assert {entry["answer"] for entry in by_topic["vsr_sample"] + by_topic["pope_sample"]} == {"yes", "no"}


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path, model_config: SphinxConfig, processor: Processor) -> Path:
    """A tiny model that has learned the form of the answers, and not much of what they say."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model = Sphinx(model_config)
    entries = json.loads((made / "train.json").read_text())
    samples = [processor.sample(to_record(entry, entry["id"], Path("/"), "chat"), "train") for entry in entries]
    collate = Collator(max(sample.length for sample in samples), processor.image_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(200):
        losses = model.token_losses(collate([[sample] for sample in rng.sample(samples, 16)]))
        optimizer.zero_grad()
        (losses.nll.mean() + losses.extra).backward()
        optimizer.step()
    return saved(tmp_path / "checkpoint", model, processor)


def most_likely(checkpoint: Path, made: Path) -> float:
    """How often the right choice of a question is the one whose tokens have the largest product of probabilities."""
    assistant = Assistant.load(checkpoint, "cpu")
    right = []
    for row in rows(made, "seedbench"):
        question = f"{row['question']}\nAnswer the question using a single word or phrase."
        scores = {}
        for letter in "ABCD":
            answer = row[f"choice_{letter.lower()}"]
            ids = assistant.encode_answer(answer)
            logits = assistant.compute_logits(Dialog(question, [row["image"][0]["bytes"]]), answer)[-len(ids) - 1 : -1]
            scores[letter] = float(logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum())
        right.append(max(scores, key=lambda letter: scores[letter]) == row["answer"])
    return sum(right) / len(right)


@pytest.mark.long
def test_lmms_eval_gives_the_scores_of_evaluate(
    environment: str, sample_data: Path, made: Path, checkpoint: Path
) -> None:
    harness.write_tasks(made, environment)
    theirs = harness.run_lmms(made, environment, checkpoint)
    ours = harness.run_evaluate(made, checkpoint, sample_data)
    print(theirs, ours)
    assert len(ours) == len(theirs) - 1
    assert {task: theirs[task] for task in ours} == pytest.approx(ours)
    assert theirs["seedbench_ppl_sample"] == pytest.approx(most_likely(checkpoint, made))
    assert sum(0 < score < 1 for score in theirs.values()) >= 3  # what never or always is right compares nothing
    in_two_processes = harness.run_lmms(made, environment, checkpoint, processes=2, batch_size=3, name="two")
    assert in_two_processes == pytest.approx(theirs)
