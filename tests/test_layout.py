"""A lower layer never imports a higher one, and no modules import each other in a circle.

Imports inside functions and those for type checkers count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "sphinx_pl"
LAYERS = (
    *("cli", "apps", "pipeline", "settings", "callbacks", "planning", "stages", "distributed", "evaluation", "mixing"),
    *("generation", "checkpoints", "models", "data", "runtime", "utils"),
)
"""The layers from the highest to the lowest."""


def modules() -> dict[str, Path]:
    """Return the package's modules by name."""
    folders = {PACKAGE: REPOSITORY / PACKAGE, f"{PACKAGE}.callbacks": REPOSITORY / "callbacks"}
    paths: dict[str, Path] = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            paths[".".join([package, *parts[: -1 if parts[-1] == "__init__" else None]])] = path
    return paths


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Yield the package's modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


GRAPH = {
    name: {other for other in imports(path) if other in MODULES and other not in (PACKAGE, name)}
    for name, path in MODULES.items()
}


def test_a_folder_is_a_layer_and_the_package_s_top_is_empty() -> None:
    top = {name.split(".")[1] for name in MODULES if name != PACKAGE}
    assert top == set(LAYERS)
    assert not [path.name for path in (REPOSITORY / PACKAGE).glob("*.py") if path.name != "__init__.py"]


def test_no_layer_imports_a_higher_one() -> None:
    upward = [
        f"{name} -> {other}"
        for name, others in GRAPH.items()
        for other in others
        if name != PACKAGE and LAYERS.index(other.split(".")[1]) < LAYERS.index(name.split(".")[1])
    ]
    assert upward == []


def test_no_class_name_is_defined_twice() -> None:
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(f"{module}.{node.name}")
    assert [names for names in places.values() if len(names) > 1] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
