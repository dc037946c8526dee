from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sphinx_pl.checkpoints import tensors as checkpoint_tensors
from sphinx_pl.checkpoints.format import FORMATS, open_checkpoint
from sphinx_pl.checkpoints.native import SphinxCheckpoint, write_checkpoint
from sphinx_pl.checkpoints.tensors import TensorDict, same_bits
from sphinx_pl.cli.checkpoint import main
from sphinx_pl.cli.checkpoint import main as command
from sphinx_pl.models.config import SphinxConfig, VisionConfig
from sphinx_pl.models.encoders.clip import ClipViTConfig
from sphinx_pl.models.encoders.qformer import QFormerConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.checkpoints.conftest import PROCESSOR, cached, random_tensors, small_config

Write = Callable[..., Path]


def only_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("max_shard_bytes", [1, 500, 2**30])
def test_round_trip_is_bitwise_whatever_the_shards(write: Write, max_shard_bytes: int) -> None:
    tensors = random_tensors(0)
    tensors["decoder.a"][0, :3] = torch.tensor([-0.0, float("nan"), 1e-45])
    checkpoint = open_checkpoint(write("a", tensors, max_shard_bytes=max_shard_bytes))
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(checkpoint.tensor(name), tensor), name
        assert checkpoint.info(name).shape == tuple(tensor.shape)
        assert checkpoint.info(name).dtype == tensor.dtype
    assert checkpoint.model_config == small_config()
    assert checkpoint.processor == PROCESSOR
    assert checkpoint.tokenizer_file.read_bytes() == b"pieces"
    assert checkpoint.provenance == {"stage": "a"}


def test_shards_stay_below_the_limit_and_the_index_counts_them(write: Write) -> None:
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(7)}  # 100 bytes each
    path = write("a", tensors, max_shard_bytes=250)
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 700
    assert index["weight_map"]["t6"] == shards[-1]
    assert list(open_checkpoint(path)) == list(tensors)


def test_views_of_one_storage_are_stored_once_each(write: Write) -> None:
    whole = torch.arange(12.0).view(3, 4)
    checkpoint = open_checkpoint(write("a", {"row": whole[1], "column": whole[:, 1], "all": whole}))
    assert checkpoint.tensor("row").tolist() == [4, 5, 6, 7]
    assert checkpoint.tensor("column").tolist() == [1, 5, 9]


def test_dtype_converts_floating_tensors_only(write: Write) -> None:
    checkpoint = open_checkpoint(write("a", dtype=torch.bfloat16))
    assert checkpoint.info("decoder.a").dtype == torch.bfloat16
    assert checkpoint.info("mixer.towers.clip.steps").dtype == torch.int64
    assert torch.equal(checkpoint.tensor("decoder.a"), random_tensors(0)["decoder.a"].bfloat16())


VISION = VisionConfig(
    image_size=28,
    encoders={
        "clip": ClipViTConfig(image_size=28, patch_size=14, width=16, layers=1, heads=2),
        "qformer": QFormerConfig(28, 14, 16, 1, 2, 32, 2, 16, 2, 2, 32, 2),
    },
)


@pytest.mark.parametrize(
    "config",
    [small_config(tie_embeddings=True), SphinxConfig("seeing", small_config().decoder, VISION)],
    ids=["tied", "seeing"],
)
def test_a_real_model_gives_equal_logits_after_a_round_trip(write: Write, config: SphinxConfig) -> None:
    torch.manual_seed(0)
    source, target = Sphinx(config).eval(), Sphinx(config).eval()
    checkpoint = open_checkpoint(write("a", source.state_dict(), model=config.to_dict()))
    assert ("decoder.output.weight" in checkpoint) is not config.decoder.tie_embeddings
    assert checkpoint.model_config == config

    def logits(model: Sphinx) -> Tensor:
        ids = torch.arange(10).view(1, 10)
        embedded = model.decoder.embed(ids)
        if config.vision is not None:
            pixels = torch.arange(3 * 28 * 28).view(1, 3, 28, 28) % 255
            embedded = torch.cat([model.embed_images(pixels.to(torch.uint8)), embedded], dim=1)
        positions = torch.arange(embedded.shape[1])[None]
        return model.decoder.logits(model.decoder(embedded, positions, None))

    with torch.no_grad():
        assert not torch.equal(logits(source), logits(target))
        checkpoint.load_into(target)
        assert torch.equal(logits(source), logits(target))


def test_load_into_another_model_names_what_differs_and_copies_nothing(write: Write) -> None:
    model = Sphinx(small_config())
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    tensors["decoder.norms.weight"] = tensors.pop("decoder.norm.weight")
    tensors["decoder.tok_embeddings.weight"] = torch.zeros(32, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        open_checkpoint(write("a", tensors)).load_into(model)
    message = only_line(error)
    assert "1 missing: 'decoder.norm.weight' (it has 'decoder.norms.weight')" in message
    assert "1 unexpected: 'decoder.norms.weight'" in message
    assert "'decoder.tok_embeddings.weight' is [32, 16] instead of [48, 16]" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_existing_path_is_kept_unless_overwrite(write: Write, tmp_path: Path) -> None:
    path = write("a", {"t": torch.zeros(3)})
    with pytest.raises(UserError, match="overwrite=true"):
        write("a", {"t": torch.ones(3)})
    assert open_checkpoint(path).tensor("t").tolist() == [0, 0, 0]
    write("a", {"u": torch.ones(3)}, overwrite=True)
    assert list(open_checkpoint(path)) == ["u"]
    other = tmp_path / "results"
    other.mkdir()
    (other / "precious.txt").write_text("kept")
    with pytest.raises(UserError, match="not a checkpoint"):
        write("results", overwrite=True)
    assert (other / "precious.txt").read_text() == "kept"
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_failing_source_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")

    class Broken(TensorDict):
        def tensor(self, name: str) -> Tensor:
            if name == "u":
                raise UserError("the source broke")
            return super().tensor(name)

    weights = Broken({"t": torch.zeros(3), "u": torch.zeros(3)})
    with pytest.raises(UserError, match="the source broke"):
        write_checkpoint(tmp_path / "a", weights, small_config().to_dict(), {}, tmp_path / "tokenizer.model", {})
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.checkpoints.tensors import TensorDict
folder = Path(sys.argv[1])
class Killed(TensorDict):
    def tensor(self, name):
        if name == "t7":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().tensor(name)
weights = Killed({f"t{i}": torch.zeros(1000) for i in range(10)})
write_checkpoint(
    folder / "a", weights, {"decoder": {}}, {}, folder / "tokenizer.model", {}, max_shard_bytes=8000, overwrite=True
)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_write_leaves_no_half_checkpoint_under_the_final_name(
    write: Write, tmp_path: Path, existing: bool
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    if existing:
        write("a", {"t": torch.ones(3)})
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / ".a.tmp").iterdir()), "it was killed before it wrote anything"
    if existing:
        assert open_checkpoint(tmp_path / "a").tensor("t").tolist() == [1, 1, 1]
    else:
        assert not (tmp_path / "a").exists()
    write("a", {"t": torch.zeros(3)}, overwrite=True)
    assert open_checkpoint(tmp_path / "a").tensor("t").tolist() == [0, 0, 0]
    assert not (tmp_path / ".a.tmp").exists()


@pytest.mark.parametrize("folder", ["", "/finetune/sphinx"])
@pytest.mark.parametrize("revision", ["", "@main", f"@{'0' * 40}"])
def test_a_name_on_the_hub_is_found_in_its_cache(write: Write, cache: Path, revision: str, folder: str) -> None:
    shutil.copytree(write("a"), cached(cache, "some/model", f".{folder}"), dirs_exist_ok=True)
    assert set(open_checkpoint(f"hf-hub:some/model{revision}{folder}")) == set(random_tensors(0))


def test_another_revision_is_not_enough(write: Write, cache: Path) -> None:
    shutil.copytree(write("a"), cached(cache, "some/model", "."), dirs_exist_ok=True)
    with pytest.raises(UserError, match="hf download some/model --revision v2 --include"):
        open_checkpoint("hf-hub:some/model@v2")


def test_another_folder_of_the_repository_is_not_enough(write: Write, cache: Path) -> None:
    shutil.copytree(write("a"), cached(cache, "some/model", "one"), dirs_exist_ok=True)
    with pytest.raises(UserError, match="'hf-hub:some/model/two' is neither in"):
        open_checkpoint("hf-hub:some/model/two")


def test_a_name_that_is_not_in_the_cache(cache: Path) -> None:
    with pytest.raises(UserError) as error:
        open_checkpoint("hf-hub:meta-llama/Llama-2-7b-hf")
    message = only_line(error)
    assert str(cache) in message
    assert "models--meta-llama--Llama-2-7b-hf" in message
    assert "model*.safetensors" in message


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:gpt2", "hf-hub:a//b"])
def test_what_is_no_name_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="OWNER/NAME"):
        open_checkpoint(name)


def _mapped(folder: Path) -> int:
    """Bytes of a folder's files that are resident in this process."""
    resident, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counts = f" {folder}/" in line
        elif counts and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


def test_many_shards_share_one_budget(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_tensors, "MAPPED_BYTES", 2**22)
    tensors = {f"t{i}": torch.zeros(2**18) for i in range(32)}  # 1 MiB each
    checkpoint = open_checkpoint(write("many", tensors, max_shard_bytes=2**21))
    largest = 0
    for name in checkpoint:
        assert float(checkpoint.tensor(name).sum()) == 0
        largest = max(largest, _mapped(tmp_path))
    assert 2**20 <= largest <= 2**22 + 2**21 + 2**20


def test_a_file_that_is_gone_disturbs_no_other(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.zeros(2**18) for i in range(8)}
    gone, here = (open_checkpoint(write(name, tensors)) for name in ("gone", "here"))
    gone.tensor("t0")
    shutil.rmtree(gone.path)
    monkeypatch.setattr(checkpoint_tensors, "MAPPED_BYTES", 2**20)
    assert all(here.tensor(name).numel() == 2**18 for name in here)
    with pytest.raises(UserError, match="missing"):
        gone.tensor("t1")


def test_showing_a_checkpoint_takes_no_name_as_markup(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("[bold]a[x]")
    _edit(path / "provenance.json", command=["mix_weights.py", "checkpoints=[/data/a,/data/b]"])
    assert command(["show", str(path)]) == 0
    assert "checkpoints=[/data/a,/data/b]" in capsys.readouterr().out


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


SHARD = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda p: (p / SHARD).unlink(), [SHARD, "missing"]),
        (lambda p: (p / "tokenizer.model").unlink(), ["tokenizer.model", "missing"]),
        (lambda p: (p / "provenance.json").unlink(), ["provenance.json", "missing"]),
        (lambda p: (p / "model.safetensors.index.json").unlink(), ["index.json", "missing"]),
        (lambda p: (p / "config.json").unlink(), ["config.json", "not a checkpoint", "sphinx_pl"]),
        (lambda p: (p / "config.json").write_text("{"), ["config.json", "cannot be read"]),
        (lambda p: (p / "config.json").write_text("[]"), ["config.json", "JSON object"]),
        (lambda p: _edit(p / "config.json", format=7), ["config.json", "format 7", "reads 1"]),
        (lambda p: _edit(p / "config.json", model=None), ["config.json", "'model'"]),
        (lambda p: _edit(p / "model.safetensors.index.json", weight_map={}), ["index.json", "weight_map"]),
        (lambda p: _edit(p / "model.safetensors.index.json", weight_map={"x": SHARD}), [SHARD, "disagree"]),
        (
            lambda p: _edit(p / "model.safetensors.index.json", weight_map={"x": "gone.safetensors"}),
            ["gone.safetensors"],
        ),
        (lambda p: _truncate(p / SHARD), [SHARD, "damaged"]),
        (lambda p: (p / SHARD).write_bytes(b"\xff" * 100), [SHARD, "damaged"]),
        (lambda p: (p / SHARD).write_bytes(b""), [SHARD, "damaged"]),
    ],
)
def test_a_damaged_checkpoint_is_answered_in_one_line(
    write: Write, damage: Callable[[Path], object], names: list[str]
) -> None:
    path = write("a")
    damage(path)
    with pytest.raises(UserError) as error:
        open_checkpoint(path)
    message = only_line(error)
    assert str(path) in message
    assert all(name in message for name in names), message


def test_a_path_without_a_checkpoint_is_answered_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    # Somebody else's config.json does not make a folder ours.
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    assert not SphinxCheckpoint.matches(tmp_path)
    with pytest.raises(UserError, match="not a checkpoint"):
        open_checkpoint(tmp_path)
    assert FORMATS["sphinx_pl"] is SphinxCheckpoint


def test_identity_follows_the_content(write: Write) -> None:
    a, same, other = (open_checkpoint(write(name, seed)).identity() for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert a["stage"] == "a"
    assert a["sha256"] == same["sha256"] != other["sha256"]


def test_the_checkpoint_in_a_runs_folder_is_named(write: Write, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected a folder with config\.json"):
        open_checkpoint(tmp_path / "run")
    write("model").rename(tmp_path / "run" / "model")
    with pytest.raises(UserError, match=f"did you mean '{tmp_path}/run/model' in it"):
        open_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [
        {"parents": ["a"]},
        {"parents": [{"path": "x"}]},
        {"command": 5},
        {"mixing": "linear"},
        {"mixing": {"method": "x"}},
    ],
)
def test_show_says_whose_provenance_it_does_not_know(
    write: Write, capsys: pytest.CaptureFixture[str], content: dict[str, Any]
) -> None:
    path = write("checkpoint", 0)
    (path / "provenance.json").write_text(json.dumps(content))
    assert main(["show", str(path)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "mixer.towers.clip" in output
    assert "command" in output if "command" in content else "not written by this project" in output


def test_show_prints_parts_and_parents(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("a")
    assert main(["show", str(path)]) == 0
    output = capsys.readouterr().out
    assert "mixer.towers.clip" in output
    assert "bfloat16" in output
    assert "364" in output  # 35 + 300 + 24 + 1 + 4 parameters
    assert main(["show", str(path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_an_interpolation_in_a_checkpoint_is_refused_not_resolved(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "not to be read")
    path = write("a", random_tensors(0))
    content = json.loads((path / "config.json").read_text())
    content["model"]["name"] = "${oc.env:SECRET}"
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="interpolation") as error:
        open_checkpoint(path)
    assert "not to be read" not in only_line(error)
