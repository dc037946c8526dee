"""Whole checkpoints mixed: layouts in and out, what is refused, kills."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sphinx_pl.checkpoints.folder import INDEX, TOKENIZER, write_json
from sphinx_pl.checkpoints.format import Checkpoint, open_checkpoint, with_common_names
from sphinx_pl.checkpoints.huggingface import HuggingFaceCheckpoint, HuggingFaceFolder, write_huggingface
from sphinx_pl.checkpoints.original import decoder_sizes
from sphinx_pl.checkpoints.tensors import TensorDict, content_hash, same_bits
from sphinx_pl.checkpoints.torch_shards import split
from sphinx_pl.checkpoints.training import TensorShard, TrainingCheckpoint, describe, write_rest, write_shards
from sphinx_pl.checkpoints.writer import CheckpointWriter
from sphinx_pl.cli.checkpoint import main as command
from sphinx_pl.mixing.methods import mix_tensors
from sphinx_pl.mixing.mix import mix, mix_checkpoints, needs_our_names
from sphinx_pl.mixing.plan import MixRecipe, check_weights, open_models, plan_mixture
from sphinx_pl.mixing.show import distances_table
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.decoder import Decoder
from sphinx_pl.utils.errors import UserError
from tests.checkpoints.conftest import PROCESSOR, random_tensors, small_config, write_torch
from tests.checkpoints.conftest import write as write  # a fixture
from tests.mixing.conftest import huggingface_folder

Write = Callable[..., Path]
PIECES = (Path(__file__).parent.parent / "golden" / "tokenizer.model").read_bytes()


def values(path: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.tensor(name) for name in checkpoint}


def expected(a: Mapping[str, Tensor], b: Mapping[str, Tensor], weights: list[float]) -> dict[str, Tensor]:
    return {
        name: mix_tensors("linear", [tensor, b[name]], weights) if tensor.is_floating_point() else tensor
        for name, tensor in a.items()
    }


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name, tensor in wanted.items() if not same_bits(found[name], tensor)]
    assert not different


# -- layouts ---------------------------------------------------------------------------------------------------------


def decoder_tensors(seed: int, config: SphinxConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    decoder = Decoder(config.decoder)
    decoder.init_weights()
    tensors = {f"decoder.{name}": tensor.to(dtype) for name, tensor in decoder.state_dict().items()}
    return {name: t + 0.01 * torch.randn_like(t) for name, t in tensors.items()}


@pytest.fixture
def two(tmp_path: Path, write: Write) -> list[Path]:
    """A text-only model twice, in our layout, bf16."""
    config = small_config(kv_heads=2)
    tensors = [decoder_tensors(seed, config) for seed in (0, 1)]
    return [write(f"ours_{seed}", t, model=config.to_dict(), tokenizer=PIECES) for seed, t in enumerate(tensors)]


def as_huggingface(path: Path, out: Path) -> Path:
    write_huggingface(open_checkpoint(path), out)
    return out


def as_meta(path: Path, out: Path, shards: int) -> Path:
    checkpoint = open_checkpoint(path)
    out.mkdir()
    names = {name.removeprefix("decoder."): name for name in checkpoint}
    for rank in range(shards):
        parts = {short: split(short, checkpoint.tensor(name), shards)[rank] for short, name in names.items()}
        write_torch(out / f"consolidated.{rank:02d}.pth", TensorDict(parts))
    write_json(out / "params.json", decoder_sizes(checkpoint.model_config.decoder))
    shutil.copyfile(checkpoint.tokenizer_file, out / TOKENIZER)
    return out


def as_training(path: Path, out: Path, ranks: int) -> Path:
    """A training checkpoint of a sharded run: float32 masters, pieces that end in the middle of tensors."""
    checkpoint = open_checkpoint(path)
    out.mkdir()
    for rank in range(ranks):
        pieces = []
        for name in checkpoint:
            flat = checkpoint.tensor(name).float().flatten()
            cuts = [len(flat) * r // ranks for r in range(ranks + 1)]
            pieces.append(TensorShard("weight", name, cuts[rank], flat[cuts[rank] : cuts[rank + 1]]))
            pieces.append(TensorShard("exp_avg", name, cuts[rank], flat[cuts[rank] : cuts[rank + 1]] * 0))
        write_shards(out, rank, ranks, pieces)
    write_rest(out, ranks, {name: checkpoint.info(name).shape for name in checkpoint}, {})
    config = checkpoint.config
    describe(out, config["model"], config["processor"], checkpoint.tokenizer_file, {"stage": "training"})
    return out


def test_our_folders_keep_files_names_and_what_else_is_there(two: list[Path], tmp_path: Path) -> None:
    said = mix_checkpoints(two, [0.25, 0.75], tmp_path / "out")
    assert_equal(values(tmp_path / "out"), expected(values(two[0]), values(two[1]), [0.25, 0.75]))
    a, out = (open_checkpoint(path) for path in (two[0], tmp_path / "out"))
    assert [file.name for file in out.files()] == [file.name for file in a.files()]
    assert out.config == a.config
    assert out.tokenizer_file.read_bytes() == PIECES
    assert said == out.provenance["mixing"]


def test_huggingface_folders_keep_files_and_names(two: list[Path], tmp_path: Path) -> None:
    paths = [as_huggingface(path, tmp_path / f"hf_{i}") for i, path in enumerate(two)]
    (paths[0] / "generation_config.json").write_text("{}")
    for name in ("README.md", "trainer_state.json", "results.zip"):  # of this model or its training
        (paths[0] / name).write_text("{}")
    mix_checkpoints(paths, [0.4, 0.6], tmp_path / "out")
    models, _ = open_models([*paths, tmp_path / "out"])
    assert all(isinstance(model, HuggingFaceFolder) for model in models)
    a, b, out = ({key: _read(model, key) for key in model} for model in models)
    assert_equal(out, expected(a, b, [0.4, 0.6]))
    assert "model.layers.0.self_attn.q_proj.weight" in out
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not {"README.md", "trainer_state.json", "results.zip"} & {f.name for f in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads((paths[0] / INDEX).read_text())
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert same_bits(model.state_dict()["model.norm.weight"], out["model.norm.weight"])
    # As ours they are the same mixture: rows of queries and keys lie elsewhere, no value differs.
    assert_equal(values(tmp_path / "out"), expected(values(two[0]), values(two[1]), [0.4, 0.6]))


def _read(stored: Any, key: str) -> Tensor:
    info = stored.info(key)
    out = torch.empty(info.numel, dtype=info.dtype)
    with stored.open(key) as read:
        read(out, 0)
    return out.view(info.shape)


def test_a_huggingface_folder_of_a_model_that_nobody_here_knows(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for number in range(2):
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        torch.manual_seed(number)
        save_file({"conv.weight": torch.randn(3, 4), "ids": torch.arange(3)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "mamba9", "size": 4, "dtype": "float32"}))
    mix_checkpoints([tmp_path / "m0", tmp_path / "m1"], [0.5, 0.5], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "provenance.json",
    ]
    a, b, out = open_models([tmp_path / "m0", tmp_path / "m1", tmp_path / "out"])[0]
    assert_equal({"w": _read(out, "conv.weight")}, {"w": (_read(a, "conv.weight") + _read(b, "conv.weight")) / 2})
    # 16 bits are said in the config too.
    mix(plan_mixture([a, b], None, MixRecipe([0.5, 0.5])), tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert HuggingFaceFolder(tmp_path / "half").info("conv.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("shards", [1, 2])
def test_metas_folders_are_mixed_file_by_file(two: list[Path], tmp_path: Path, shards: int) -> None:
    paths = [as_meta(path, tmp_path / f"meta_{i}", shards) for i, path in enumerate(two)]
    mix_checkpoints(paths, [0.3, 0.7], tmp_path / "out")
    assert_equal(values(tmp_path / "out"), expected(values(two[0]), values(two[1]), [0.3, 0.7]))
    assert len(list((tmp_path / "out").glob("consolidated.*.pth"))) == shards


def test_slerp_of_split_tensors_is_that_of_whole_ones(two: list[Path], tmp_path: Path) -> None:
    paths = [as_meta(path, tmp_path / f"meta_{i}", 2) for i, path in enumerate(two)]
    mix_checkpoints(paths, [0.3, 0.7], tmp_path / "out", method="slerp")
    a, b = values(two[0]), values(two[1])
    assert_equal(values(tmp_path / "out"), {n: mix_tensors("slerp", [a[n], b[n]], [0.3, 0.7]) for n in a})


def test_training_checkpoints_are_mixed_as_they_are(two: list[Path], tmp_path: Path) -> None:
    paths = [as_training(two[0], tmp_path / "step-10", 2), as_training(two[1], tmp_path / "step-20", 3)]
    assert isinstance(open_checkpoint(paths[0]), TrainingCheckpoint)
    mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    a, b = ({n: t.float() for n, t in values(path).items()} for path in two)
    assert_equal(values(tmp_path / "out"), expected(a, b, [0.5, 0.5]))
    assert open_checkpoint(tmp_path / "out").provenance["parents"][0]["stage"] == "training"


def test_layouts_may_differ(two: list[Path], tmp_path: Path) -> None:
    """Ours with Meta's of two files, and a training checkpoint with ours, whose dtypes differ: bf16 is asked for."""
    other = as_meta(two[1], tmp_path / "meta", 2)
    with pytest.raises(UserError, match="not of one processor"):
        mix_checkpoints([two[0], other], [0.5, 0.5], tmp_path / "no")
    training = as_training(two[1], tmp_path / "training", 2)
    models, _ = open_models([two[0], training])
    with pytest.raises(UserError, match=r"bfloat16 in .* but torch\.float32 .*dtype=fp32 or bf16 or fp16"):
        plan_mixture(models, None, MixRecipe([0.5, 0.5]))
    mix(plan_mixture(models, None, MixRecipe([0.5, 0.5]), cast=True), tmp_path / "out", dtype=torch.bfloat16)
    assert_equal(values(tmp_path / "out"), expected(values(two[0]), values(two[1]), [0.5, 0.5]))


@pytest.mark.parametrize(
    ("name", "shards", "kind"),
    [("huggingface", None, HuggingFaceCheckpoint), ("sphinx_pl", None, None)],
)
def test_the_layout_can_be_chosen(
    two: list[Path], tmp_path: Path, name: str, shards: int | None, kind: type[Checkpoint] | None
) -> None:
    source = two if kind is not None else [as_huggingface(p, tmp_path / f"hf_{i}") for i, p in enumerate(two)]
    assert needs_our_names(source, name, shards)
    models, _ = open_models(source, own=False)
    mix(plan_mixture(models, None, MixRecipe([0.5, 0.5])), tmp_path / "out", layout=name, shards=shards)
    if kind is not None:
        assert isinstance(open_checkpoint(tmp_path / "out"), kind)
    assert_equal(values(tmp_path / "out"), expected(values(two[0]), values(two[1]), [0.5, 0.5]))
    assert not needs_our_names([tmp_path / "out"], name, None)


def test_dtypes_can_be_chosen(two: list[Path], tmp_path: Path) -> None:
    models, _ = open_models(two)
    mix(plan_mixture(models, None, MixRecipe([0.5, 0.5])), tmp_path / "out", dtype=torch.float32)
    a, b = ({n: t.float() for n, t in values(path).items()} for path in two)
    assert_equal(values(tmp_path / "out"), expected(a, b, [0.5, 0.5]))


def test_the_same_whatever_the_threads(two: list[Path], tmp_path: Path) -> None:
    for workers in (1, 4):
        models, base = open_models(two, two[0])
        recipe = MixRecipe([0.7, 0.4], "dare", {"density": 0.3, "seed": 5})
        mix(plan_mixture(models, base, recipe), tmp_path / f"out_{workers}", workers=workers)
    assert_equal(values(tmp_path / "out_1"), values(tmp_path / "out_4"))


def test_frozen_encoders_are_copied_also_where_weights_do_not_sum_to_one(
    models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = models(2, frozen="mixer.towers.")
    stored, _ = open_models(paths)
    mix(plan_mixture(stored, None, MixRecipe([0.5, 0.6], any_sum=True)), tmp_path / "out")
    a, out = values(paths[0]), values(tmp_path / "out")
    assert all(same_bits(out[name], a[name]) for name in a if name.startswith("mixer.towers."))
    assert not same_bits(out["decoder.norm.weight"], a["decoder.norm.weight"])
    parts = open_checkpoint(tmp_path / "out").provenance["mixing"]["parts"]
    assert {name for name, part in parts.items() if part["equal"]} == {"clip", "convnext", "dinov2", "qformer"}


# -- provenance ------------------------------------------------------------------------------------------------------


def test_provenance_says_what_went_in_and_how_far_apart_it_was(two: list[Path], tmp_path: Path) -> None:
    mix_checkpoints(two, [0.25, 0.75], tmp_path / "out")
    provenance = open_checkpoint(tmp_path / "out").provenance
    hashes = [content_hash(stored) for stored in open_models(two)[0]]
    assert [parent["xxh3_128"] for parent in provenance["parents"]] == hashes
    assert hashes[0] != hashes[1]
    assert [parent["stage"] for parent in provenance["parents"]] == ["ours_0", "ours_1"]
    assert provenance["mixing"]["weights"] == [0.25, 0.75]
    a, b = values(two[0]), values(two[1])
    names = [name for name in a if "tok_embeddings" in name or "output" in name]
    flat = [torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (a, b)]
    part = provenance["mixing"]["parts"]["embeddings"]
    assert part["parameters"] == len(flat[0])
    assert part["norms"] == pytest.approx([float(x.norm()) for x in flat])
    assert part["distances"] == [[0, 1, pytest.approx(float((flat[0] - flat[1]).norm()))]]
    assert part["cosines"] == [[0, 1, pytest.approx(float(torch.cosine_similarity(*flat, dim=0)))]]


def test_provenance_compares_what_was_learned(two: list[Path], write: Write, tmp_path: Path) -> None:
    config = small_config(kv_heads=2)
    base = write("base", decoder_tensors(2, config), model=config.to_dict(), tokenizer=PIECES)
    said = mix_checkpoints(two, [0.5, 0.5], tmp_path / "out", base=base, method="task_arithmetic")
    a, b, origin = (
        torch.cat([t.double().flatten() for n, t in values(path).items() if "embeddings" in n or "output" in n])
        for path in (*two, base)
    )
    cosine = float(torch.cosine_similarity(a - origin, b - origin, dim=0))
    assert said["parts"]["embeddings"]["task_cosines"] == [[0, 1, pytest.approx(cosine)]]
    assert said["base"] == str(base)


def test_the_hash_does_not_depend_on_files(write: Write) -> None:
    tensors = random_tensors(0)
    one, many = write("one", tensors), write("many", tensors, max_shard_bytes=100)
    assert len(list(many.glob("*.safetensors"))) > 2
    assert len({content_hash(*with_common_names([open_checkpoint(path)])) for path in (one, many)}) == 1


def test_the_hashes_that_a_mixture_names_are_shown(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder's tensors have other names and places among checkpoints of other layouts."""
    hf = as_huggingface(two[1], tmp_path / "hf")
    assert command(["show", "--hash", str(hf)]) == 0
    shown = capsys.readouterr().out
    for number, (a, b) in enumerate(
        ((as_meta(two[0], tmp_path / "meta", 2), hf), (hf, as_huggingface(two[0], tmp_path / "hf_0")))
    ):
        mix_checkpoints([a, b], [0.5, 0.5], tmp_path / f"out_{number}")
        parent = open_checkpoint(tmp_path / f"out_{number}").provenance["parents"][1 - number]
        assert f"xxh3_128 {parent['xxh3_128']} ({parent['layout']})" in shown


def test_distances_are_shown_in_80_columns(two: list[Path], write: Write, tmp_path: Path) -> None:
    config = small_config(kv_heads=2)
    base = write("base", decoder_tensors(2, config), model=config.to_dict(), tokenizer=PIECES)
    said = mix_checkpoints(two, [0.5, 0.5], tmp_path / "out", base=base, method="task_arithmetic")
    console = Console(width=80, file=io.StringIO())
    console.print(distances_table(said))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "…" not in "".join(lines)
    rows = [line for line in lines if "%" in line]
    between = [re.search(r"\d, (\d|base)", line)[0] for line in rows]  # type: ignore[index]
    assert between == 2 * ["0, 1", "0, base", "1, base"]
    for part, row in zip(said["parts"].values(), rows[::3], strict=True):
        assert f"{part['task_cosines'][0][2]:.4f}" in row


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "normalize", "message"),
    [
        ([0.5], False, "1 numbers for 2 checkpoints"),
        ([0.5, 0.6], False, "sum to 1.1, not 1"),
        ([0.5, 0.5 + 2e-6], False, "normalize=true"),
        ([float("nan"), 0.5], False, "finite"),
        ([1.0, -1.0], True, "sum to 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: list[float], normalize: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_weights(weights, 2, normalize)


def test_weights_are_normalized_or_taken_as_they_are() -> None:
    assert check_weights([1, 3], 2, normalize=True) == [0.25, 0.75]
    assert sum(check_weights([0.3333333, 0.6666666], 2)) == pytest.approx(1, abs=1e-15)
    assert check_weights([1, 3], 2, any_sum=True) == [1, 3]


@pytest.mark.parametrize(
    ("recipe", "base", "message"),
    [
        (MixRecipe(), False, "how much of each checkpoint"),
        (MixRecipe([1.0, 0.0], "uniform_soup"), False, "chooses the weights itself"),
        (MixRecipe([1.0, 0.0], "ties"), False, "starts from a base model: give base=FOLDER"),
        (MixRecipe([1.0, 0.0]), True, "method=linear has no base: leave base out, or choose one that has: ties"),
        (MixRecipe([1.0, 0.0], "slurp"), False, "did you mean 'slerp'"),
        (MixRecipe([1.0, 0.0], "ema", {"decy": 1.0}), False, "did you mean 'decay'"),
        (MixRecipe([1.0, 0.0], arithmetic="float16"), False, "arithmetic=float16"),
        (MixRecipe(None, rules=[{"match": "decoder", "beta": 0.3}]), False, "no rule fits"),
    ],
)
def test_recipes_that_cannot_be_are_refused(write: Write, recipe: MixRecipe, base: bool, message: str) -> None:
    paths = [write("a", 0), write("b", 1)]
    models, start = open_models(paths, paths[0] if base else None)
    with pytest.raises(UserError, match=message) as error:
        plan_mixture(models, start, recipe)
    assert "\n" not in str(error.value)


def test_slerp_is_for_two_and_one_needs_a_base(write: Write) -> None:
    models, _ = open_models([write(name, seed) for seed, name in enumerate("abc")])
    with pytest.raises(UserError, match="method=slerp is for 2 checkpoints, not 3"):
        plan_mixture(models, None, MixRecipe([0.2, 0.3, 0.5], "slerp"))
    with pytest.raises(UserError, match="at least two"):
        plan_mixture(models[:1], None, MixRecipe([1.0]))
    plan_mixture(models[:1], models[1], MixRecipe([0.5], "task_arithmetic"))


def _with(name: str, value: Tensor) -> dict[str, Tensor]:
    return random_tensors(1) | {name: value}


def _without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in random_tensors(1).items() if key != name}


NAN = torch.full((5, 7), 1.0)
NAN[2, 3] = float("nan")


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"model": small_config(rope_theta=5e5).to_dict()}, ["model.decoder.rope_theta", "10000.0", "500000.0"]),
        ({"processor": PROCESSOR | {"decimals": 2}}, ["processor.decimals"]),
        ({"tokenizer": b"other pieces"}, ["tokenizers differ"]),
        ({"tensors": _without("decoder.b")}, ["missing: 'decoder.b'"]),
        ({"tensors": _with("decoder.extra", torch.zeros(1))}, ["unexpected: 'decoder.extra'"]),
        ({"tensors": _with("decoder.a", torch.zeros(7, 5))}, ["'decoder.a' is [7, 5] instead of [5, 7]"]),
        ({"tensors": _with("decoder.a", torch.zeros(5, 7).half())}, ["'decoder.a'", "float32", "float16"]),
        ({"tensors": _with("decoder.a", NAN)}, ["'decoder.a'", "NaN"]),
        ({"tensors": _with("decoder.a", torch.full((5, 7), float("inf")))}, ["'decoder.a'", "infinite"]),
        ({"tensors": _with("mixer.towers.clip.steps", torch.zeros(4).long())}, ["steps", "integers"]),
    ],
)
def test_checkpoints_that_do_not_go_together_are_refused(
    write: Write, tmp_path: Path, other: dict[str, Any], names: list[str]
) -> None:
    options = {"tensors": 1} | other
    a, b = write("a", 0), write("b", **options)
    with pytest.raises(UserError) as error:
        mix_checkpoints([a, b], [0.5, 0.5], tmp_path / "out")
    message = str(error.value)
    assert "\n" not in message
    assert str(b) in message or "integers" in message
    assert all(name in message for name in names), message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"model_type": "llama", "rope_theta": 5e5}, "config.json"),
        ("tokenizer.model", None, r"tokenizers differ in tokenizer\.model \(if that changes nothing"),
    ],
)
def test_huggingface_folders_that_do_not_go_together(
    two: list[Path], tmp_path: Path, file: str, content: dict[str, Any] | None, message: str
) -> None:
    paths = [as_huggingface(path, tmp_path / f"hf_{i}") for i, path in enumerate(two)]
    target = paths[1] / file
    if content is None:
        target.write_bytes(b"other")
    else:
        target.write_text(json.dumps(json.loads(target.read_text()) | content))
    with pytest.raises(UserError, match=message):
        mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    (paths[1] / file).write_bytes((paths[0] / file).read_bytes())
    other = paths[1] / "config.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"pad_token_id": 0, "attention_dropout": 0.1}))
    mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (paths[0] / "config.json").read_bytes()


def test_a_missing_tokenizer_is_said_before_anything_is_written(two: list[Path], tmp_path: Path) -> None:
    hf = [as_huggingface(path, tmp_path / f"hf_{i}") for i, path in enumerate(two)]
    for path in hf:
        for file in path.glob("tokenizer*"):
            file.unlink()
    models, base = open_models(hf, own=False)
    plan = plan_mixture(models, base, MixRecipe([0.5, 0.5]))
    for name in ("sphinx_pl", "huggingface"):
        with pytest.raises(UserError, match=r"tokenizer\.model' is missing"):
            mix(plan, tmp_path / "out", layout=name)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_whole_numbers_are_not_averaged_with_others(write: Write, tmp_path: Path, dtype: torch.dtype | None) -> None:
    a, b = write("a", 0), write("b", _with("decoder.a", torch.ones(5, 7, dtype=torch.int8)))
    models, base = open_models([a, b])
    with pytest.raises(UserError, match=r"'decoder\.a' is torch\.float32 .* torch\.int8 .*, which cannot be mixed"):
        plan_mixture(models, base, MixRecipe([0.5, 0.5]), cast=dtype is not None)


def test_nan_is_named_with_its_file(write: Write, tmp_path: Path) -> None:
    a, b = write("a", 0, max_shard_bytes=100), write("b", _with("decoder.a", NAN), max_shard_bytes=100)
    with pytest.raises(UserError, match=r"'decoder\.a' in '.*/b/model-\d+-of-\d+\.safetensors' holds NaN"):
        mix_checkpoints([a, b], [0.5, 0.5], tmp_path / "out")


def test_names_and_weight_sources_may_differ(write: Write, tmp_path: Path) -> None:
    renamed = small_config().to_dict() | {"name": "other"}
    mix_checkpoints([write("a", 0), write("b", 1, model=renamed)], [0.5, 0.5], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["name"] == "small"


def test_an_overflow_is_refused(write: Write, tmp_path: Path) -> None:
    large = [{"t": torch.tensor([sign * 60000.0]).half()} for sign in (1, -1)]
    paths = [write(name, tensors) for name, tensors in zip("ab", large, strict=True)]
    with pytest.raises(UserError, match=r"'t' overflows torch.float16"):
        mix_checkpoints(paths, [1.5, -0.5], tmp_path / "out")


def test_what_is_no_checkpoint_is_not_replaced(write: Write, tmp_path: Path) -> None:
    a, b = write("a", 0), write("b", 1)
    with pytest.raises(UserError, match="exists"):
        mix_checkpoints([a, b], [0.5, 0.5], a)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not a checkpoint"):
        mix_checkpoints([a, b], [0.5, 0.5], tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()
    mix_checkpoints([a, b], [1, 0], tmp_path / "out")
    mix_checkpoints([a, b], [0, 1], tmp_path / "out", overwrite=True)
    assert_equal(values(tmp_path / "out"), values(b))


def test_overwriting_deletes_no_source_and_no_folder(write: Write, tmp_path: Path) -> None:
    a, b = write("run", 0), write("run/step", 1)
    for paths, out, message in (
        ([a, b], a, "at '.*/run' would delete '.*/run', which is needed"),
        ([b, b], a, "at '.*/run' would delete '.*/run/step', which is needed"),
        ([write("c", 0), write("d", 1)], a, "would delete the folder 'step' in"),
    ):
        with pytest.raises(UserError, match=message):
            mix_checkpoints(paths, [0.5, 0.5], out, overwrite=True)
    assert (b / "config.json").exists()


def test_a_link_is_followed_and_stays(write: Write, tmp_path: Path) -> None:
    paths = [write("a", 0), write("b", 1)]
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk" / "out")
    for weights in ([1, 0], [0, 1]):
        mix_checkpoints(paths, weights, tmp_path / "out", overwrite=weights == [0, 1])
    assert (tmp_path / "out").is_symlink()
    assert_equal(values(tmp_path / "large disk" / "out"), values(paths[1]))
    assert not list(tmp_path.rglob(".*"))


def test_what_somebody_else_makes_meanwhile_stays(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, other, real = [write("a", 0), write("b", 1)], write("other", 2), CheckpointWriter._fill

    def meanwhile(*arguments: Any) -> None:
        real(*arguments)
        other.rename(tmp_path / "out")

    monkeypatch.setattr(CheckpointWriter, "_fill", meanwhile)
    with pytest.raises(UserError, match=r"was made by somebody else meanwhile.* whole in '.*/\.out\.tmp'"):
        mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    assert_equal(values(tmp_path / "out"), random_tensors(2))
    assert_equal(values(tmp_path / ".out.tmp"), expected(random_tensors(0), random_tensors(1), [0.5, 0.5]))


def test_integers_that_differ_are_taken_from_whom_the_weights_say(write: Write, tmp_path: Path) -> None:
    steps = "mixer.towers.clip.steps"
    a, b = write("a", 0), write("b", _with(steps, torch.zeros(4).long()))
    with pytest.raises(UserError, match=rf"rules=\[{{match: '{steps}', weights: \[1, 0\]}}\]"):
        mix_checkpoints([a, b], [0.5, 0.5], tmp_path / "out")
    mix_checkpoints([a, b], [0.5, 0.5], tmp_path / "out", rules=[{"match": steps, "weights": [1, 0]}])
    assert values(tmp_path / "out")[steps].tolist() == [0, 1, 2, 3]
    mix_checkpoints([a, b], [0, 1], tmp_path / "second")
    assert_equal(values(tmp_path / "second"), values(b))
    short = write("short", _with(steps, torch.arange(4, dtype=torch.int32)))
    with pytest.raises(UserError, match=r"'mixer.towers.clip.steps' is torch.int64 .* integers of two dtypes"):
        plan_mixture(open_models([a, short])[0], None, MixRecipe([0.5, 0.5]), cast=True)


def test_a_quantized_model_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    plain, quantized = {"w": torch.ones(4)}, {"w": torch.ones(4).to(torch.float8_e4m3fn)}
    a, b = huggingface_folder(tmp_path / "a", plain), huggingface_folder(tmp_path / "b", quantized)
    for paths in ([a, b], [b, a]):
        with pytest.raises(UserError, match=r"'w' in '.*/b' is torch.float8_e4m3fn, a quantized model's"):
            plan_mixture(open_models(paths)[0], None, MixRecipe([0.5, 0.5]), cast=True)


def test_an_index_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = huggingface_folder(tmp_path / "a", {"w": torch.ones(4)})
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(("w", "v"), "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json' has 'v' in model-00001-of-00001.safetensors, where it is not"):
        open_models([path])


def test_folders_that_are_not_mixed_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [huggingface_folder(tmp_path / name, {"w": torch.ones(4)}) for name in "ab"]
    (paths[0] / "2_Dense").mkdir()
    (paths[0] / "checkpoint-500").mkdir()
    mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    assert "not mixed and not copied: 2_Dense" in caplog.text


def test_metas_tokenizer_may_lie_one_level_up(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    paths = [as_meta(path, tmp_path / "llama" / str(i), 1) for i, path in enumerate(two)]
    for path in paths:
        (path / TOKENIZER).rename(tmp_path / "llama" / TOKENIZER)
    mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    assert (tmp_path / "out" / TOKENIZER).read_bytes() == (tmp_path / "llama" / TOKENIZER).read_bytes()


def stop_after_two_files(paths: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture with equal weights, interrupted."""
    real = CheckpointWriter._fill

    def interrupted(writer: CheckpointWriter, files: list[Any], *rest: Any) -> None:
        real(writer, files[:2], *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "_fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mix_checkpoints(paths, [0.5, 0.5], out)
    assert len(list(out.with_name(f".{out.name}.tmp").glob("model-*.safetensors"))) == 2


def test_files_of_another_version_of_an_input_are_not_gone_on_with(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where size and time are the same, as after rsync -t."""
    paths = [write(name, {f"t{i}": torch.randn(4) for i in range(3)}, max_shard_bytes=16) for name in "ab"]
    stop_after_two_files(paths, tmp_path / "out", monkeypatch)
    for file in paths[1].glob("*.safetensors"):
        before = file.stat()
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 0x80]))  # the last value's sign
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    assert_equal(values(tmp_path / "out"), expected(values(paths[0]), values(paths[1]), [0.5, 0.5]))


def test_half_a_character_in_a_config_is_written_as_it_came(tmp_path: Path) -> None:
    paths = [huggingface_folder(tmp_path / name, {"w": torch.ones(4)}, said="\ud800", dtype="float32") for name in "ab"]
    mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["said"] == "\ud800"


def test_distances_that_are_too_large_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = [{"w": torch.full((4,), scale, dtype=torch.float64)} for scale in (1e200, 3e200)]
    paths = [huggingface_folder(tmp_path / name, t) for name, t in zip("ab", tensors, strict=True)]
    mix_checkpoints(paths, [0.5, 0.5], tmp_path / "out")
    content = (tmp_path / "out" / "provenance.json").read_text()
    assert json.loads(content, parse_constant=pytest.fail)["mixing"]["parts"]["other"]["norms"] == [None, None]
    assert command(["show", str(tmp_path / "out")]) == 0
    assert "–" in capsys.readouterr().out


def test_a_layout_of_that_name_must_exist_and_suit(two: list[Path]) -> None:
    with pytest.raises(UserError, match="layout=hugingface: did you mean 'huggingface'"):
        needs_our_names(two, "hugingface", None)
    models, _ = open_models(two, own=False)
    with pytest.raises(UserError, match="none of the original's types"):
        mix(plan_mixture(models, None, MixRecipe([0.5, 0.5])), "nowhere", layout="original")
    for wrong, message in (("hugingface", "did you mean"), ("huggingface", "under our names")):
        with pytest.raises(UserError, match=message):
            mix(plan_mixture(open_models(two)[0], None, MixRecipe([0.5, 0.5])), "nowhere", layout=wrong)
    with pytest.raises(UserError, match="layout=original too"):
        mix(plan_mixture(models, None, MixRecipe([0.5, 0.5])), "nowhere", shards=2)


# -- kills -----------------------------------------------------------------------------------------------------------


def kill_and_repeat(folder: Path, write: Write, kills: int, numel: int, shards: int, seed: int) -> list[str]:
    """Kill a mixing of two checkpoints at random moments and run it again, until `kills` kills hit one that was not
    done; what each kill left."""
    rng = random.Random(seed)
    size = 2 * numel * 4
    for name, draw in (("a", 0), ("b", 1)):
        generator = torch.Generator().manual_seed(draw)
        tensors = {f"decoder.{i}": torch.randn(numel // 4, generator=generator).bfloat16() for i in range(4 * shards)}
        write(name, tensors, max_shard_bytes=size // 4)
    a, b, out = folder / "a", folder / "b", folder / "out"
    wanted = expected(values(a), values(b), [0.4, 0.6])
    mix_checkpoints([a, b], [0.4, 0.6], folder / "first")  # loads the kernel, for the forks too

    def run(seconds: float | None) -> float:
        arguments = ([a, b], [0.4, 0.6], out)
        process = multiprocessing.get_context("fork").Process(target=mix_checkpoints, args=arguments)
        begin = time.monotonic()
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        else:
            assert process.exitcode == 0
        return time.monotonic() - begin

    whole = run(None)
    assert_equal(values(out), wanted)
    left: list[str] = []
    while len(left) - left.count("done") < kills:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder / ".out.tmp", ignore_errors=True)
        run(rng.uniform(0, whole))
        kept = len(list((folder / ".out.tmp").glob("model-*.safetensors")))
        if out.exists():  # it was done before, but perhaps for the end of the process
            assert_equal(values(out), wanted)
            left.append("done")
            whole *= 0.95
            continue
        before = {file.name: file.stat().st_mtime_ns for file in (folder / ".out.tmp").glob("model-*.safetensors")}
        noted = {file.name.removesuffix(".json") for file in (folder / ".out.tmp" / ".journal").glob("model-*.json")}
        left.append(f"{kept} of {shards} files" if (folder / ".out.tmp").exists() else "nothing")
        run(None)
        assert_equal(values(out), wanted)
        after = {file.name: file.stat().st_mtime_ns for file in out.glob("model-*.safetensors")}
        assert all(after[name] == at for name, at in before.items() if name in noted)
        assert not (folder / ".out.tmp").exists()
        assert [parent["xxh3_128"] for parent in open_checkpoint(out).provenance["parents"]] == [
            content_hash(*with_common_names([open_checkpoint(path)])) for path in (a, b)
        ]
    return left


def test_a_killed_mixing_leaves_no_half_model_and_goes_on(tmp_path: Path, write: Write) -> None:
    left = kill_and_repeat(tmp_path, write, kills=8, numel=2_000_000, shards=4, seed=0)
    assert len(left) - left.count("done") == 8


@pytest.mark.long
def test_twenty_kills(tmp_path: Path, write: Write) -> None:
    left = kill_and_repeat(tmp_path, write, kills=20, numel=16_000_000, shards=6, seed=1)
    print(left)
    assert any(said[0] in "12345" for said in left)


def test_a_rerun_with_other_weights_begins_anew(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete files of another mixture are not mistaken for this one's."""
    paths = [write(name, {f"t{i}": torch.randn(4) for i in range(3)}, max_shard_bytes=16) for name in "ab"]
    stop_after_two_files(paths, tmp_path / "out", monkeypatch)
    mix_checkpoints(paths, [0.25, 0.75], tmp_path / "out")
    assert_equal(values(tmp_path / "out"), expected(values(paths[0]), values(paths[1]), [0.25, 0.75]))
