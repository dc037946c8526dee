"""How much a model of the sample world makes up: questions about what is there (POPE), descriptions (CHAIR).

    python -m benchmarks.hallucination questions --data data/sample
    python -m benchmarks.hallucination ask CHECKPOINT --data data/sample

`questions` writes yes/no questions about every described scene to DATA/instructions/{train,test}-yes_no.json, half of
them about an object that is not there: for the first file to be trained on, the second to be asked. The sample data
have no such task. POPE: Li et al. 2023, arXiv 2305.10355; CHAIR: Rohrbach et al. 2018, arXiv 1809.02156.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import decoding
from benchmarks.decoding import records_of
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.sample_world.drawing import COLORS, SHAPES
from sphinx_pl.data.sample_world.language import with_article
from sphinx_pl.data.sample_world.scenes import DIGITS
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import read_yes_no
from sphinx_pl.evaluation import choosing
from sphinx_pl.evaluation.question import question_of
from sphinx_pl.generation.generate import GenerationConfig, OperaConfig, Prompt
from sphinx_pl.runtime.hydra_app import report
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import write_whole

PHRASES = tuple(f"{color} {kind}" for color in COLORS for kind in (*SHAPES, *DIGITS))
_MENTION = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join((*SHAPES, *DIGITS))})\b")
QUESTION = "Is there {} in the image?"
KINDS = ("random", "adversarial")
"""Of absent objects: any; one that has the colour or the shape of an object that is there."""

WAYS = decoding.WAYS | {
    "OPERA 5, the paper's formula": GenerationConfig(num_beams=5, opera=OperaConfig(damping=1.0, early_tokens=0))
}


def mentioned(text: str) -> set[str]:
    """The objects that a description names: "red square"."""
    return {match[0] for match in _MENTION.finditer(text)}


def absent(scene: set[str], kind: str, rng: random.Random) -> str:
    """An object that is not in the scene; `kind` is one of `KINDS`."""
    words = {word for phrase in scene for word in phrase.split()}
    others = [phrase for phrase in PHRASES if phrase not in scene]
    if kind == "adversarial":
        others = [phrase for phrase in others if words & set(phrase.split())]
    return rng.choice(others)


def questions(entries: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """For each described scene and each kind of absent object: one question to be answered yes, one no."""
    rng = random.Random(seed)
    asked = []
    for entry in entries:
        if entry.get("task") != "description":
            continue
        scene = mentioned(entry["answer"])
        for kind in KINDS:
            for answer, phrase in (("yes", rng.choice(sorted(scene))), ("no", absent(scene, kind, rng))):
                common = {key: entry[key] for key in ("image", "width", "height")}
                meta = {"domain": entry["meta"]["domain"], "topic": kind}
                question = QUESTION.format(with_article(phrase))
                asked.append(
                    common
                    | {"id": f"{entry['id']}-{kind}-{answer}", "task": "yes_no", "question": question}
                    | {"answer": answer, "meta": meta}
                )
    return asked


def write_questions(data: Path) -> dict[str, int]:
    """Both files from those of the sample data; the number of questions in each.

    Raises:
        UserError: no sample data there.
    """
    folder, counts = data / "instructions", {}
    for split, source in (("train", "train-scenes.json"), ("test", "test.json")):
        try:
            entries = json.loads((folder / source).read_text())
        except OSError:
            raise UserError(
                f"'{folder / source}' cannot be read: make it with python -m sphinx_pl.cli.sample"
            ) from None
        asked = questions(entries)
        write_whole(folder / f"{split}-yes_no.json", json.dumps(asked) + "\n")
        counts[split] = len(asked)
    return counts


@dataclass(frozen=True)
class Yes:
    """POPE's figures, all in 0-1; "yes" is the positive answer. What is neither yes nor no counts as no, as in POPE."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparsed: int


def pope(said: Sequence[str], truth: Sequence[str]) -> Yes:
    """Answers' texts beside the right ones ("yes" or "no")."""
    read = [read_yes_no(text, Coordinates()) for text in said]
    yes = [parsed.formed and parsed.answer == "yes" for parsed in read]
    right = sum(one == (true == "yes") for one, true in zip(yes, truth, strict=True))
    hits = sum(one and true == "yes" for one, true in zip(yes, truth, strict=True))
    precision, recall = hits / max(1, sum(yes)), hits / max(1, truth.count("yes"))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    unparsed = sum(not parsed.formed for parsed in read)
    return Yes(right / len(said), precision, recall, f1, sum(yes) / len(said), unparsed)


@dataclass(frozen=True)
class Made:
    """CHAIR's figures in 0-1: the share of named objects that are not there, and of descriptions with one; and how many
    of the objects that are there are named."""

    objects: float
    descriptions: float
    recall: float


def chair(said: Sequence[str], truth: Sequence[str]) -> Made:
    """Descriptions beside true ones that name every object."""
    named = [(mentioned(text), mentioned(true)) for text, true in zip(said, truth, strict=True)]
    wrong, all_named = sum(len(a - b) for a, b in named), sum(len(a) for a, _ in named)
    found, there = sum(len(a & b) for a, b in named), sum(len(b) for _, b in named)
    return Made(wrong / max(1, all_named), sum(bool(a - b) for a, b in named) / len(named), found / max(1, there))


def ask(checkpoint: str, data: Path, limit: int | None, batch_size: int, device: str) -> list[Table]:
    """Both tables, of every way to decode.

    Raises:
        UserError: no such checkpoint or data.
        SkipSample: a question that cannot be asked.
    """
    model, processor = decoding.load(checkpoint, device)
    folder = data / "instructions"
    polar = records_of(folder / "test-yes_no.json")
    scenes = [record for record in records_of(folder / "test.json") if record.task == "description"]
    rng = random.Random(0)
    drawn = [some if limit is None or limit >= len(some) else rng.sample(some, limit) for some in (polar, scenes)]
    ends = {"eos_id": processor.tokenizer.eos_id, "stop": processor.stop_sequences}
    asked, described = (decoding.prepared(model, processor, some) for some in drawn)

    def texts(asked: tuple[list[Prompt], list[Record]], config: GenerationConfig, ranking: bool = False) -> list[str]:
        prompts, records = asked
        config = dataclasses.replace(config, **ends)
        said = []
        for start in range(0, len(prompts), batch_size):
            cut = slice(start, start + batch_size)
            questions = [question_of(record, processor.coordinates) for record in records[cut]]
            said += choosing.answer(model, processor, questions, prompts[cut], config, ranking)
        return said

    yes = Table("", "objects", "accuracy", "precision", "recall", "F1", "yes", "unparsed", title="Is there ...?")
    made = Table("", "objects not there", "descriptions with one", "recall", title=f"{len(described[1])} descriptions")
    for name, config in WAYS.items():
        for kind, figures in _by_kind(asked[1], texts(asked, config)).items():
            yes.add_row(name, kind, *_cells(figures))
        found = chair(texts(described, config), [record.answer for record in described[1]])
        made.add_row(name, *(f"{value:.3f}" for value in dataclasses.astuple(found)))
    for kind, figures in _by_kind(asked[1], texts(asked, GenerationConfig(), ranking=True)).items():
        yes.add_row("likelihood", kind, *_cells(figures))
    return [yes, made]


def _by_kind(records: Sequence[Record], said: Sequence[str]) -> dict[str, Yes]:
    """POPE's figures for each kind of absent object, with the number of questions."""
    found = {}
    for kind in KINDS:
        pairs = [(text, r.answer) for text, r in zip(said, records, strict=True) if r.meta["topic"] == kind]
        if pairs:
            found[f"{kind}, {len(pairs)}"] = pope([text for text, _ in pairs], [true for _, true in pairs])
    return found


def _cells(figures: Yes) -> list[str]:
    *shares, unparsed = dataclasses.astuple(figures)
    return [*(f"{value:.3f}" for value in shares), str(unparsed)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("questions", "ask"):
        command = commands.add_parser(name)
        command.add_argument("--data", default="data/sample", type=Path, help="the sample data (default: data/sample)")
        if name == "ask":
            command.add_argument("checkpoint", help="a checkpoint folder")
            command.add_argument("--limit", type=int, help="at most so many questions and descriptions (default: all)")
            command.add_argument("--batch", type=int, default=32, help="default: 32")
            command.add_argument("--device", default="cpu")
    o = parser.parse_args(arguments)
    console = Console()
    try:
        if o.command == "questions":
            for split, count in write_questions(o.data).items():
                console.print(f"{count:6d} {split}")
        else:
            for table in ask(o.checkpoint, o.data, o.limit, o.batch, o.device):
                console.print(table)
    except (UserError, SkipSample) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
