"""How much a model of the sample world makes up: questions about what is there (POPE), descriptions (CHAIR).

    python -m benchmarks.hallucination questions --data data/sample
    python -m benchmarks.hallucination ask CHECKPOINT --data data/sample

`questions` writes yes/no questions about every described scene to DATA/instructions/{train,test}-yes_no.json, half of
them about an object that is not there: for the first file to be trained on, the second to be asked. The sample data
have no such task. POPE: Li et al. 2023, arXiv 2305.10355; CHAIR: Rohrbach et al. 2018, arXiv 1809.02156.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinx_pl.cli import report
from sphinx_pl.data.sample.drawing import COLORS, SHAPES
from sphinx_pl.data.sample.scenes import DIGITS
from sphinx_pl.errors import UserError
from sphinx_pl.files import write_whole

PHRASES = tuple(f"{color} {kind}" for color in COLORS for kind in (*SHAPES, *DIGITS))
_MENTION = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join((*SHAPES, *DIGITS))})\b")
QUESTION = "Is there {} in the image?"
KINDS = ("random", "adversarial")
"""Of absent objects: any; one that has the colour or the shape of an object that is there."""


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
                article = "an" if phrase[0] in "aeiou" else "a"
                common = {key: entry[key] for key in ("image", "width", "height")}
                meta = {"domain": entry["meta"]["domain"], "topic": kind}
                question = QUESTION.format(f"{article} {phrase}")
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
                f"'{folder / source}' cannot be read: make it with python -m sphinx_pl.data.sample"
            ) from None
        asked = questions(entries)
        write_whole(folder / f"{split}-yes_no.json", json.dumps(asked) + "\n")
        counts[split] = len(asked)
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("questions", "ask"):
        command = commands.add_parser(name)
        command.add_argument("--data", default="data/sample", type=Path, help="the sample data (default: data/sample)")
        if name == "ask":
            command.add_argument("checkpoint", help="a checkpoint folder")
    o = parser.parse_args(arguments)
    try:
        print(write_questions(o.data))
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
