"""A chain of small programs that stand in for trainings.

`python -m tests.pipeline.chain FOLDER [redo=NAME] [keep=NAME] ...` runs it. A step adds a line to
FOLDER/NAME.runs and obeys FOLDER/NAME.does (fail, wait). Its product is its value and the products
of the steps before it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx_pl.pipeline import local
from sphinx_pl.pipeline.recipe import Recipe, Step
from sphinx_pl.utils.errors import UserError

PROGRAM = """
import pathlib, sys, time
folder, name, value, *needs = sys.argv[1:]
folder = pathlib.Path(folder)
with (folder / f"{name}.runs").open("a") as runs:
    runs.write("x")
print("this is", name, flush=True)
does = folder / f"{name}.does"
what = does.read_text() if does.exists() else ""
if what == "fail":
    sys.exit(3)
if what == "wait":
    time.sleep(60)
made = [value, *(str((folder / need / "product").read_bytes()) for need in needs)]
(folder / name).mkdir(exist_ok=True)
if what != "nothing":
    (folder / name / "product").write_text(" ".join(made))
"""

NEEDS = {"a": (), "b": ("a",), "side": ("a",), "c": ("b",)}


def recipe(folder: Path, values: dict[str, str], redo: str = "", keep: str = "") -> Recipe:
    """Return the chain a -> b -> c, and `side` after a."""
    steps = {}
    for name, needs in NEEDS.items():
        value = values.get(name, "1")
        command = (sys.executable, "-c", PROGRAM, str(folder), name, value, *needs)
        steps[name] = Step(
            name,
            command,
            needs,
            folder / name / "product",
            f"value: {value}\n",
            launcher={"kind": "local", "grace": 20},
        )

    def named(names: str) -> frozenset[str]:
        return frozenset(steps if names == "all" else names.split(",") if names else ())

    return Recipe("chain", steps, folder / "pipeline", "local", named(redo), named(keep), dry=False)


def main() -> int:
    folder, *options = sys.argv[1:]
    values = dict(option.split("=", 1) for option in options)
    redo, keep = values.pop("redo", ""), values.pop("keep", "")
    try:
        return local.run(recipe(Path(folder), values, redo, keep), "THE COMMAND")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
