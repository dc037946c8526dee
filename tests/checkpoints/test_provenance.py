from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sphinx_pl.checkpoints.provenance import provenance
from sphinx_pl.utils.files import hash_file


def test_it_holds_code_versions_command_and_parents_but_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train.py", "stage.optim.lr=1e-4", "logger.wandb.api_key=hunter2", "+hf_token=hunter2"]
    )
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    config = {
        "data": {"max_new_tokens": 30, "tokenizer": "t.model"},
        "logger": [{"api_key": "hunter2", "access_token": None}],
    }
    parents = [{"path": "a", "stage": "pretrain_real", "sha256": "00"}]
    origin = json.loads(json.dumps(provenance("mix", config, parents)))
    assert "hunter2" not in json.dumps(origin)
    assert origin["stage"] == "mix"
    assert origin["parents"] == parents
    assert origin["config"]["data"] == config["data"]
    assert origin["config"]["logger"] == [{"api_key": "***", "access_token": None}]
    assert origin["command"] == ["train.py", "stage.optim.lr=1e-4", "logger.wandb.api_key=***", "+hf_token=***"]
    assert origin["code"]["version"]
    assert set(origin["versions"]) == {"python", "torch", "lightning"}


def test_commit_and_dirt_are_those_of_the_checkout(tmp_path: Path) -> None:
    package = tmp_path / "sphinx_pl"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "9"\n')
    source = Path(provenance.__code__.co_filename)
    (package / "checkpoints").mkdir()
    (package / "checkpoints" / "provenance.py").write_bytes(source.read_bytes())

    def code() -> dict[str, object]:
        program = "import json, sphinx_pl.checkpoints.provenance as p; print(json.dumps(p.provenance('x')['code']))"
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "somebody's project")
    assert code() == {"version": "9"}, "a package that the checkout does not track"
    git("add", ".")
    git("commit", "-m", "tracked")
    assert code() == {"version": "9", "commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text('__version__ = "10"\n')
    assert code() == {"version": "10", "commit": git("rev-parse", "HEAD"), "dirty": True}


def test_hash_file_is_sha256(tmp_path: Path) -> None:
    content = b"sphinx" * 100_000
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
