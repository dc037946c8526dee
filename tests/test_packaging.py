"""What `python -m build` makes can be installed and run away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.long


def run(*command: str, cwd: Path, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    names = run("git", "ls-files", "-z", cwd=REPOSITORY).split("\0")
    return [name for name in names if name and ((REPOSITORY / name).is_file() or (REPOSITORY / name).is_symlink())]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that nothing else that lies about gets in."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, copy / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=copy)
    [built] = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("target")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target)]
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def test_the_wheel_holds_what_a_run_needs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
        metadata = next(name for name in found if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    inside = {name for name in tracked() if name.startswith(("sphinx_pl/", "hydra_plugins/"))}
    linked = {f"sphinx_pl/{name}" for name in tracked() if name.startswith(("callbacks/", "conf/"))}
    wanted = (inside | linked) - {"sphinx_pl/callbacks", "sphinx_pl/conf"}
    assert {name for name in found if ".dist-info/" not in name} == wanted
    assert {"sphinx_pl/conf/train.yaml", "sphinx_pl/conf/data/mixture/sample_finetune.yaml"} <= found
    assert {"sphinx_pl/py.typed", "sphinx_pl/models/sphinx.py", "sphinx_pl/callbacks/export.py"} <= found
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found)
    assert "\nName: sphinx-pl\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text or "\nLicense: Apache-2.0\n" in text
    assert "\nRequires-Dist: torch>=" in text


@pytest.mark.parametrize("script", ["train", "mix_weights", "evaluate"])
def test_an_installed_script_explains_itself_from_any_folder(installed: Path, tmp_path: Path, script: str) -> None:
    help_text = run(sys.executable, "-m", f"sphinx_pl.cli.{script}", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "sphinx_13b" in help_text  # an option of the group `model`, so conf/ came along
    assert script != "train" or help_text.startswith("Train one stage")
    assert list(tmp_path.iterdir()) == []


def test_it_is_the_installed_code_that_runs_with_the_installed_configuration(installed: Path, tmp_path: Path) -> None:
    imports = "import sphinx_pl.callbacks.export as export; from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER"
    code = f"{imports}; print(export.__file__, CONFIG_FOLDER)"
    places = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert places == [str(installed / "sphinx_pl" / path) for path in ("callbacks/export.py", "conf")]
    options = ["--cfg", "job", "--resolve", "stage=finetune"]
    composed = run(sys.executable, "-m", "sphinx_pl.cli.train", *options, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "name: finetune" in composed
