"""What `python -m build` makes can be installed beside anything and runs away from the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import REPOSITORY, tracked

pytestmark = pytest.mark.long

COMMANDS = ("train", "mix", "evaluate", "chat", "data", "checkpoint", "pipeline")
PACKAGES = {"sphinx_pl", "hydra_plugins"}
"""All that an installation adds to site-packages, beside its metadata."""
MISTAKES = {
    "train": ["no_such_key=1"],
    "mix": [],
    "evaluate": [],
    "chat": [],
    "data": ["no_such_command"],
    "checkpoint": ["show", "/no/such/folder"],
    "pipeline": ["no_such_command"],
}
SMALL = [
    *("model.decoder.layers=1", "data.packing.micro_batch_rows=2", "data.val_samples=4", "stage.max_steps=2"),
    *("trainer.accelerator=cpu", "callbacks.progress.lines=1"),
]


def run(*command: str | Path, cwd: Path, code: int = 0, **environment: str) -> str:
    """What the command prints on standard output, if it ends with `code`."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel adds to site-packages, and `bin`."""
    target = tmp_path_factory.mktemp("target")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target)]
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=target)
    return target


def test_the_wheel_holds_what_a_run_needs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    inside = {name for name in tracked() if name.startswith(("sphinx_pl/", "hydra_plugins/"))}
    linked = {f"sphinx_pl/{name}" for name in tracked() if name.startswith(("callbacks/", "conf/"))}
    wanted = (inside | linked) - {"sphinx_pl/callbacks", "sphinx_pl/conf"}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {name.partition("/")[0] for name in wanted} == PACKAGES
    assert {"sphinx_pl/conf/train.yaml", "sphinx_pl/conf/data/mixture/sample_finetune.yaml"} <= names
    assert {"sphinx_pl/py.typed", "sphinx_pl/models/sphinx.py", "sphinx_pl/callbacks/export.py"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "\nName: sphinx-pl\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text or "\nLicense: Apache-2.0\n" in text
    assert "\nRequires-Dist: torch>=" in text


def test_the_wheel_is_made_of_the_source_distribution(wheel: Path) -> None:
    [archive] = wheel.parent.glob("*.tar.gz")  # `build` makes the wheel of it
    with tarfile.open(archive) as content:
        members = content.getmembers()
    assert not [member.name for member in members if member.issym()]
    names = {member.name.partition("/")[2] for member in members}
    assert {"setup.cfg", "README.md", "LICENSE", "sphinx_pl/conf/train.yaml", "sphinx_pl/callbacks/export.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "outputs", "docs"))]


def test_an_editable_installation_has_the_same_names(tmp_path: Path) -> None:
    target = tmp_path / "target"
    clone = tmp_path / "clone"
    for name in tracked():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, clone / name, follow_symlinks=False)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "install", *options, "--target", target, "-e", clone, cwd=tmp_path)
    # A finder maps the two packages, so the scripts in the clone are not importable by their plain names.
    names = ("sphinx_pl.callbacks.export", "hydra_plugins.sphinx_pl_slurm", "train", "mix_weights", "callbacks", "conf")
    code = f"import site; site.addsitedir({str(target)!r}); from importlib.util import find_spec; "
    code += f"specs = [find_spec(name) for name in {names}]; print(*(spec and spec.origin for spec in specs))"
    places = run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path).split()  # -S: nor what is installed here
    callback, plugin = ("sphinx_pl/callbacks/export.py", "hydra_plugins/sphinx_pl_slurm.py")
    assert places == [str(clone / callback), str(clone / plugin), *["None"] * 4]


def test_our_script_does_not_hide_the_package_evaluate(tmp_path: Path) -> None:
    code = "import sys; sys.path.append('packages'); import evaluate; print(evaluate.LOADED)"
    shutil.copy(REPOSITORY / "evaluate.py", tmp_path)
    error = run(sys.executable, "-c", code, cwd=tmp_path, code=1)
    assert "No module named" in error or "no package 'evaluate' is installed" in error
    (tmp_path / "packages" / "evaluate").mkdir(parents=True)
    (tmp_path / "packages" / "evaluate" / "__init__.py").write_text("LOADED = 'theirs'\n")
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "theirs\n"


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


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_0_or_with_2_on_a_mistake(installed: Path, tmp_path: Path, name: str) -> None:
    command = installed / "bin" / f"sphinx-{name}"
    environment = {"PYTHONPATH": str(installed)}
    text = run(sys.executable, command, "--help", cwd=tmp_path, **environment)
    assert len(text.splitlines()) > 3
    error = run(sys.executable, command, *MISTAKES[name], cwd=tmp_path, code=2, **environment)
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


# --- beside Hugging Face's `evaluate` and lmms-eval

VSR_ROWS = [("The circle is left of the square.", 1), ("The star is above the circle.", 0)] * 2


def write_vsr(folder: Path) -> None:
    """A data set of the form that the task `vsr` reads, and a task file that names it, in `folder`/tasks."""
    pixels = (REPOSITORY / "docs" / "shapes.jpg").read_bytes()
    rows = [{"image": {"bytes": pixels, "path": None}, "caption": text, "label": label} for text, label in VSR_ROWS]
    kinds = {"image": {"_type": "Image"}, "caption": {"_type": "Value", "dtype": "string"}}
    note = {"info": {"features": kinds | {"label": {"_type": "Value", "dtype": "int64"}}}}
    (folder / "vsr" / "data").mkdir(parents=True)
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [("image", picture), ("caption", pa.string()), ("label", pa.int64())]
    table = pa.Table.from_pylist(rows, schema=pa.schema(columns, metadata={"huggingface": json.dumps(note)}))
    pq.write_table(table, folder / "vsr" / "data" / "test-00000-of-00001.parquet")
    (folder / "tasks").mkdir()


def test_it_works_beside_evaluate_and_lmms_eval(environment: str, tmp_path: Path) -> None:
    binaries = Path(environment).parent
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}

    def call(name: str, *arguments: str | Path) -> str:
        return run(binaries / name, *arguments, cwd=tmp_path, OMP_NUM_THREADS="1", **offline)

    site = Path(call("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    record = next(site.glob("sphinx_pl-*.dist-info")) / "RECORD"
    top = {line.partition("/")[0] for line in record.read_text().splitlines()}
    assert {name for name in top if name != ".." and not name.endswith(".dist-info")} == PACKAGES
    theirs = call("python", "-c", "import evaluate; print(evaluate.__file__, hasattr(evaluate, 'load'))").split()
    assert theirs == [str(site / "evaluate" / "__init__.py"), "True"]

    here = run(binaries / "python", "-c", "import evaluate; print(evaluate.__file__)", cwd=REPOSITORY).strip()
    assert here == theirs[0]  # and not our script

    call("python", "-m", "sphinx_pl.cli.sample", "--out", "data/sample", "--scale", "0.02")
    for stage in ("pretrain_real", "pretrain_synthetic"):
        call("sphinx-train", f"stage={stage}", *SMALL)
    models = ",".join(f"outputs/demo/{stage}/model" for stage in ("pretrain_real", "pretrain_synthetic"))
    curve = ["curve=2", "curve_tasks=[short_vqa]", "curve_limit=1", "data.val_samples=4", "objective=score"]
    call("sphinx-mix", f"checkpoints=[{models}]", "beta=0.5", *curve, "out=outputs/demo/mixed", "device=cpu")
    assert "score/short_vqa" in (tmp_path / "outputs/demo/mixed/curve.csv").read_text()
    asked = ["limit=1", "shuffled=false", "constant=50", "device=cpu"]
    places = ["out=outputs/demo/evaluation", "report=outputs/demo/report.html"]
    call("sphinx-evaluate", "checkpoint=outputs/demo/mixed", *asked, *places)
    assert (tmp_path / "outputs/demo/evaluation/results.json").is_file()
    assert "<html" in (tmp_path / "outputs/demo/report.html").read_text()
    assert "\nqformer" in call("sphinx-checkpoint", "show", "outputs/demo/mixed").replace("│ ", "\n")

    write_vsr(tmp_path)
    tasks = Path(call("python", "-c", "from sphinx_pl.evaluation.lmms import TASKS; print(TASKS)").strip())
    local = {"include": str(tasks / "vsr.yaml"), "task": "vsr_here", "dataset_path": str(tmp_path / "vsr")}
    (tmp_path / "tasks" / "vsr_here.yaml").write_text(yaml.safe_dump(local | {"dataset_kwargs": {}}))
    model = ["--model", "sphinx_pl", "--model_args", "checkpoint=outputs/demo/mixed,batch_size=2,device=cpu"]
    where = ["--tasks", "vsr_here", "--include_path", tmp_path / "tasks", "--output_path", tmp_path / "scores"]
    call("lmms-eval", *model, *where)
    [scores] = (tmp_path / "scores").glob("**/*_results.json")
    assert "accuracy,none" in json.loads(scores.read_text())["results"]["vsr_here"]
