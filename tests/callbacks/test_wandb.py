"""The data that Weights & Biases gets, read back from the file of an offline run."""

from __future__ import annotations

import json
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image, ImageColor

from sphinx_pl.callbacks.predictions import Predictions
from sphinx_pl.callbacks.provenance import RunInfo
from sphinx_pl.callbacks.throughput import Throughput
from sphinx_pl.data.drawing import TRUE
from sphinx_pl.utils.errors import UserError

REPOSITORY = Path(__file__).parents[2]
Fit = Callable[..., Any]


def records(file: Path) -> Iterator[bytes]:
    """Yield the records of a .wandb file.

    It is a LevelDB log: 7 bytes of header; blocks of 32 KiB; chunks of crc, length, type.
    """
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, whole = 7, b""
    while position + 7 <= len(data):
        space = 32768 - position % 32768
        if space < 7:
            position += space
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


class Run:
    """The configuration, the (step, value) pairs of every logged key, and name -> place of every
    artifact's files.
    """

    def __init__(self, file: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        self.config: dict[str, Any] = {}
        self.history: dict[str, list[tuple[int, Any]]] = {}
        self.artifacts: list[dict[str, Path]] = []
        self.finished = False
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            for update in [*record.run.config.update, *record.config.update]:
                self.config[update.key] = json.loads(update.value_json)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                self.history.setdefault(key, []).append((int(row.get("trainer/global_step", -1)), value))
            self.finished |= record.WhichOneof("record_type") == "exit"
            if record.WhichOneof("record_type") == "artifact":
                contents = record.artifact.manifest.contents
                self.artifacts.append({entry.path: Path(entry.local_path) for entry in contents})


def finished_run(file: Path) -> Run:
    """Return the run once its last record is in the file.

    Another process writes it, and may lag on a busy machine.
    """
    deadline = time.monotonic() + 60
    while not (run := Run(file)).finished:
        assert time.monotonic() < deadline, f"{file} never got its last record; it has {sorted(run.config)}"
        time.sleep(0.2)
    return run


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True).stdout.strip()


def test_an_offline_run_holds_everything(
    fit: Fit, test_sources: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for folder in ("DATA", "CACHE", "CONFIG"):  # else tables stay in the home folder until upload
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / folder))
    composed = {
        "seed": 7,
        "stage": {"name": "finetune", "optim": {"lr": 1e-3}},
        "service": {"api_key": "not for others"},
    }
    OmegaConf.save(OmegaConf.create(composed), tmp_path / "config.yaml")
    entry = OmegaConf.load(REPOSITORY / "conf/logger/wandb.yaml").wandb
    overrides = {"group": "tests", "name": "offline", "point": None, "mode": "offline", "save_dir": str(tmp_path)}
    logger = instantiate(OmegaConf.merge(entry, overrides))
    predictions = Predictions(test_sources, str(tmp_path / "predictions"), per_task=1)
    fit([Throughput(), RunInfo(str(tmp_path / "config.yaml")), predictions], [logger])
    logger.experiment.finish()

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    run = finished_run(file)
    config, history = run.config, run.history
    assert config["stage"] == "finetune"
    assert config["config"] == composed | {"service": {"api_key": "***"}}
    tracked = git("ls-files", "sphinx_pl/__init__.py")
    assert config["git_commit"] == (git("rev-parse", "HEAD") if tracked else "")

    for name in ("train/loss", "train/lr", "train/grad_norm", "train/loss_task/short_vqa", "train/loss_task/text"):
        assert history[name], name
    assert len(history["train/loss"]) == 2  # four steps, logged every second
    assert all(0 < value < 10 for _, value in history["train/loss"])
    rates = ("tokens_per_s", "images_per_s", "targets_per_s", "samples_per_s", "mfu", "memory_gb", "time_step")
    for name in rates:
        assert all(value > 0 for _, value in history[f"perf/{name}"]), name
    assert len(history["val/loss/text"]) == 2

    assert [step for step, _ in history["predictions/path"]] == [2, 4]
    assert len(run.artifacts) == 2
    files = run.artifacts[-1]
    table = json.loads(files["predictions.table.json"].read_text())
    assert table["columns"] == ["task", "key", "image", "question", "answer", "prediction", "score"]
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    assert {"short_vqa", "rec", "multiple_choice"} <= set(rows)
    picture = Image.open(files[rows["rec"]["image"]["path"]]).convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 20) or []}
    assert ImageColor.getrgb(TRUE) in colours  # the true box of the phrase is drawn


def test_run_info_names_a_missing_file(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks\.provenance\.config.*nowhere\.yaml"):
        fit([RunInfo(str(tmp_path / "nowhere.yaml"))])
