"""lmms-eval beside evaluate.py: a checkpoint asked the same questions by both, and the scores of both.

The data sets are made from the sample data in the formats of the real ones, and asked by lmms-eval's own task files,
which are included with another `dataset_path`: POPE, SEED-Bench (an answer's letter, and the likelihood of each
choice), RefCOCO's boxes, and our VSR and OCR-VQA. `OUT/train.json` has questions of the
same kinds about the training scenes.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sphinx_pl.data.converters.vsr import STATEMENT
from sphinx_pl.data.sample_world.drawing import COLORS
from sphinx_pl.evaluation.lmms import TASKS as OUR_TASKS
from sphinx_pl.evaluation.results import read_predictions
from sphinx_pl.utils.files import write_whole

Entry = dict[str, Any]


RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
METRICS = {
    "pope_sample": "pope_accuracy",
    "seedbench_sample": "seed_all",
    "seedbench_ppl_sample": "acc",
    "refcoco_bbox_rec_sample": "refcoco_ACC@0.5",
    "vsr_sample": "accuracy",
    "ocrvqa_sample": "exact_match",
}
"""The tasks, and of each lmms-eval's metric that evaluate.py has too (but for likelihoods, which it does not ask)."""
INCLUDED = {
    "pope_sample": "pope/pope.yaml",
    "seedbench_sample": "seedbench/seedbench.yaml",
    "seedbench_ppl_sample": "seedbench/seedbench_ppl.yaml",
    "refcoco_bbox_rec_sample": "refcoco/_default_template_bbox_rec_yaml",
}
"""Below lmms-eval's folder of tasks."""

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXTS = pa.list_(pa.string())
SCHEMAS = {
    "pope": {"question_id": pa.string(), "question": pa.string(), "answer": pa.string(), "image": _IMAGE},
    "seedbench": {"question_id": pa.string(), "question": pa.string(), "answer": pa.string(), "data_type": pa.string()}
    | {f"choice_{letter}": pa.string() for letter in "abcd"}
    | {"image": pa.list_(_IMAGE)},
    "refcoco": {"question_id": pa.string(), "question": pa.string(), "answer": _TEXTS}
    | {"bbox": pa.list_(pa.float64()), "image": _IMAGE},
    "vsr": {"image": _IMAGE, "caption": pa.string(), "label": pa.int64()},
    "ocrvqa": {"image": _IMAGE, "questions": _TEXTS, "answers": _TEXTS},
}
"""Of each data set the columns that the tasks read, as the published ones have them."""


def yes_no(entry: Entry, rng: random.Random) -> Entry:
    """ "What color is the triangle?" -> "Is the triangle blue?"."""
    color = entry["answer"] if rng.random() < 0.5 else rng.choice([c for c in COLORS if c != entry["answer"]])
    thing = entry["question"].removeprefix("What color is ").removesuffix("?")
    return _asked(entry, "yes_no", f"Is {thing} {color}?", "yes" if color == entry["answer"] else "no")


def statement(entry: Entry, rng: random.Random) -> tuple[str, int]:
    """ "Where is the blue 6 relative to the star?" -> ("The blue 6 is left of the star.", whether that is true)."""
    relation = entry["answer"] if rng.random() < 0.5 else rng.choice([r for r in RELATIONS if r != entry["answer"]])
    thing, _, other = entry["question"].removeprefix("Where is ").removesuffix("?").partition(" relative to ")
    caption = f"{thing} is {RELATIONS[relation]} {other}."
    return caption[0].upper() + caption[1:], int(relation == entry["answer"])


def _asked(entry: Entry, task: str, question: str, answer: str) -> Entry:
    kept = {key: entry[key] for key in ("id", "image", "width", "height")}
    return kept | {"task": task, "question": question, "answer": answer}


def _topic(entry: Entry, topic: str) -> Entry:
    """For evaluate.py, whose results are by task and topic."""
    return {**entry, "id": f"{topic}-{entry['id']}", "meta": {"topic": topic}}


def questions(entries: Iterable[Entry], seed: int = 0) -> dict[str, list[tuple[Entry, ...]]]:
    """Of each data set the documents: entries about one image, of which evaluate.py asks each."""
    rng = random.Random(seed)
    items: dict[str, list[tuple[Entry, ...]]] = defaultdict(list)
    for entry in entries:
        task, topic = entry.get("task"), entry.get("meta", {}).get("topic")
        if task == "short_vqa" and topic == "color":
            asked = yes_no(entry, rng)
            items["pope"].append((asked,))
            items["ocrvqa"].append((entry, {**asked, "task": "short_vqa", "id": f"{entry['id']}-2"}))
        elif task == "relation" and entry["answer"] in RELATIONS:
            caption, label = statement(entry, rng)
            asked = _asked(entry, "yes_no", STATEMENT.format(caption=caption), "yes" if label else "no")
            items["vsr"].append((asked | {"caption": caption, "label": label},))
        elif task == "multiple_choice" and len(entry["choices"]) == 4:
            items["seedbench"].append((entry,))
        elif task == "rec":
            items["refcoco"].append((entry,))
    return items


def row(name: str, document: Sequence[Entry], image: bytes) -> dict[str, Any]:
    """A document as its data set has it."""
    first, picture = document[0], {"bytes": image, "path": None}
    if name == "pope":
        return {**first, "question_id": first["id"], "image": picture}
    if name == "seedbench":
        choices = {f"choice_{letter}": choice for letter, choice in zip("abcd", first["choices"], strict=True)}
        answer = "ABCD"[first["choices"].index(first["answer"])]
        named = {"question_id": first["id"], "question": first["question"], "data_type": "image"}
        return {**named, "answer": answer, **choices, "image": [picture]}
    if name == "refcoco":
        x1, y1, x2, y2 = first["regions"][0]["box"]
        box = {"bbox": [x1, y1, x2 - x1, y2 - y1]}
        return {"question_id": first["id"], "question": "", "answer": [first["question"]], **box, "image": picture}
    if name == "vsr":
        return {"image": picture, "caption": first["caption"], "label": first["label"]}
    return {"image": picture} | {f"{key}s": [entry[key] for entry in document] for key in ("question", "answer")}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """A column's type in the words of `datasets`, which makes pictures of bytes where its own note says so."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type)}
    return {"_type": "Value", "dtype": "float64" if kind == pa.float64() else str(kind)}


def write_data_set(folder: Path, name: str, documents: Sequence[Sequence[Entry]], images: Path) -> None:
    """A parquet file that `datasets.load_dataset(folder)` reads as the split `test`."""
    columns = SCHEMAS[name]
    rows = [row(name, document, (images / document[0]["image"]).read_bytes()) for document in documents]
    features = {column: _feature(kind) for column, kind in columns.items()}
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items()), metadata=note))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "data" / "test-00000-of-00001.parquet")


def make(sample: Path, out: Path, limit: int) -> None:
    """The data sets with at most `limit` documents each, the same questions for evaluate.py, and some to train on."""
    instructions = sample / "instructions"
    result = questions(json.loads((instructions / "test.json").read_text()))
    names = {name.partition("_")[0]: name for name in METRICS if "ppl" not in name}
    asked: list[Entry] = []
    for name, documents in result.items():
        write_data_set(out / name, name, documents[:limit], instructions)
        asked += [_topic(entry, names[name]) for document in documents[:limit] for entry in document]
    training = [
        {**entry, "id": f"{name}-{entry['id']}"}
        for name, documents in questions(json.loads((instructions / "train-scenes.json").read_text()), 1).items()
        for document in documents
        for entry in document
    ]
    for file, entries in (("questions.json", asked), ("train.json", training)):
        # What stands in VSR's columns alone is no key of an instruction file.
        ours = [{key: value for key, value in entry.items() if key not in ("caption", "label")} for entry in entries]
        placed = [{**entry, "image": str((instructions / entry["image"]).resolve())} for entry in ours]
        write_whole(out / file, json.dumps(placed))


def write_tasks(out: Path, python: str) -> Path:
    """Task files that include lmms-eval's own, or ours, with the made data sets. The folder for `--include_path`."""
    code = "import lmms_eval.tasks; print(lmms_eval.tasks.__file__)"
    printed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    theirs = Path(printed.split()[-1]).parent
    folder = out / "tasks"
    folder.mkdir(exist_ok=True)
    for task in METRICS:
        name = task.partition("_")[0]
        included = theirs / INCLUDED[task] if task in INCLUDED else OUR_TASKS / f"{name}.yaml"
        local = {"dataset_path": str((out / name).resolve()), "dataset_name": None, "dataset_kwargs": {}}
        text = yaml.safe_dump({"include": str(included), "task": task, "test_split": "test", **local})
        write_whole(folder / f"{task}.yaml", text)
    return folder


def run_lmms(
    out: Path, python: str, checkpoint: Path, processes: int = 1, batch_size: int = 16, name: str = "results"
) -> dict[str, float]:
    """lmms-eval's score for every task of `METRICS`, from `python -m lmms_eval`, under torchrun if in several
    processes; what it was asked and what was answered is in `OUT/<name>`."""
    command = [python, "-m", "lmms_eval"]
    if processes > 1:
        command = [python, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "lmms_eval"]
    results = (out / name).resolve()
    command += ["--model", "sphinx_pl", "--tasks", ",".join(METRICS), "--include_path", str(out.resolve() / "tasks")]
    command += ["--model_args", f"checkpoint={checkpoint.resolve()},batch_size={batch_size},device=cpu"]
    command += ["--output_path", str(results), "--log_samples"]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(out.resolve() / "cache")}
    # It writes a file for SEED-Bench's server to where it is run.
    done = subprocess.run(command, cwd=out, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    files = list(results.glob("**/*_results.json"))
    if done.returncode or len(files) != 1:  # a run that failed ends with 0 all the same
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    scores = json.loads(files[0].read_text())["results"]
    return {task: float(scores[task][f"{metric},none"]) for task, metric in METRICS.items()}


def run_evaluate(out: Path, checkpoint: Path, sample: Path) -> dict[str, float]:
    """evaluate.py's score for the same questions."""
    folder = out / "evaluate"
    source = f"{{kind: instructions, path: {out.resolve() / 'questions.json'}}}"
    command = [
        sys.executable,
        "-m",
        "sphinx_pl.cli.evaluate",
        f"checkpoint={checkpoint}",
        f"out={folder}",
        f"data.root={sample}",
    ]
    command += [f"data.test.tasks={source}", "shuffled=false", "constant=0", "device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    scores: dict[str, list[float]] = defaultdict(list)
    for prediction in read_predictions(folder):
        scores[prediction.topic].append(prediction.score)
    return {task: sum(values) / len(values) for task, values in scores.items()}
