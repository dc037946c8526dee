"""`plan=true`: what it says is what is measured, and what cannot be planned is one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from perf import memory
from perf.gpu import LEAN
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.planning.engines import Engine, Sizes, gathered_by_zero3, states
from sphinx_pl.planning.gpus import GPUS, find_gpu, flops_of_device
from sphinx_pl.planning.memory import built
from sphinx_pl.planning.plan import make_plan, trainer_section
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER, register_resolvers
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY
from tests.scripts import run_script

PAPER = ("experiment=paper_pretrain_real", "model=sphinx_13b", "data.root=nowhere")
CLUSTER = ("trainer=zero3", "trainer.devices=8", "trainer.num_nodes=64")
FROZEN = "stage.train_parts=[decoder,projections]"
# Not tiny: 30 million parameters, of which activations are the smaller half.
SIZES = [f"model.decoder.{key}" for key in ("width=512", "heads=8", "kv_heads=8", "layers=8", "ffn_width=1408")]
ROWS = ["data.packing.micro_batch_rows=2", "data.packing.row_length=256"]
SHALLOW_ENCODERS = [
    f"model.vision.encoders.{key}=1"
    for key in ("clip.layers", "dinov2.layers", "qformer.vision_layers", "qformer.layers")
]
DECODER_ALONE = [*SHALLOW_ENCODERS, "model.vision.encoders.convnext.depths=[1,1,1,1]"]
"""Encoders that are next to nothing beside the decoder."""


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg: DictConfig = compose("train", list(overrides))
    return cfg


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["trainer.precision=32-true", "data.packing.micro_batch_rows=4"], marks=pytest.mark.long),
        pytest.param(["stage.accumulate=2", FROZEN], marks=pytest.mark.long),
        [*SIZES, *ROWS, FROZEN, "stage.checkpointing=full"],
        pytest.param([*SIZES, *ROWS, FROZEN], marks=pytest.mark.long),
        pytest.param([*SIZES, *ROWS, "stage.checkpointing=selective"], marks=pytest.mark.long),
        pytest.param([*SIZES, *ROWS, "stage.train_parts=[projections,qformer]"], marks=pytest.mark.long),
    ],
    ids=["float32", "accumulated", "full", "larger", "selective", "decoder frozen"],
)
def test_memory_is_what_is_allocated(overrides: list[str]) -> None:
    everything = ["model=sphinx_sample", "trainer=cpu", *overrides]
    assert memory.measure(everything, images=2.0, supervised=0.5).ratio == pytest.approx(1, abs=0.1)


# Buckets and distances in proportion to the model.
SMALL_BUCKETS = [
    f"+trainer.strategy.zero.{key}"
    for key in ("reduce_bucket_size=1500000", "stage3_max_reuse_distance=0", "stage3_prefetch_bucket_size=0")
]
TWO_RANKS = {
    "ddp": ["trainer=cpu", "trainer.devices=2", "++trainer.strategy=ddp"],
    "zero3": ["trainer=zero3_cpu"],
    "zero3, small buckets": ["trainer=zero3_cpu", *SMALL_BUCKETS],
    "zero3, bf16": ["trainer=zero3_cpu", "trainer.precision=bf16-true", *SMALL_BUCKETS],
    "zero3, no masters": ["trainer=zero3_cpu", "trainer.precision=bf16-true", *SMALL_BUCKETS, *LEAN],
    "zero3, offloaded": ["trainer=zero3_offload", "trainer.accelerator=cpu", "trainer.devices=2", *SMALL_BUCKETS],
    "fsdp2": (fsdp2 := ["trainer=fsdp2", "trainer.accelerator=cpu", "trainer.devices=2"]),
    "fsdp2, sharded": [*fsdp2, "trainer.strategy.frozen=sharded", "stage.checkpointing=full"],
}


@pytest.mark.long
@pytest.mark.parametrize("engine", TWO_RANKS)
def test_memory_of_two_ranks_is_what_is_allocated(engine: str) -> None:
    everything = ["model=sphinx_sample", *SIZES, *ROWS, FROZEN, *TWO_RANKS[engine]]
    assert memory.measure(everything, images=2.0, supervised=0.5).ratio == pytest.approx(1, abs=0.1)


@pytest.mark.long
def test_depth_and_rows_are_extrapolated_exactly() -> None:
    """A decoder of six blocks is simulated whole, one of twelve is not."""
    common = ["model=sphinx_sample", "trainer=gpu", "model.decoder.layers=12", "plan_for.images_per_row=2"]
    two = make_plan(composed(*common, "data.packing.micro_batch_rows=2", "data.root=nowhere"))
    six = make_plan(composed(*common, "data.packing.micro_batch_rows=6", "data.root=nowhere"))
    assert six.largest_rows == two.largest_rows
    room = two.gpu_bytes
    at = make_plan(
        composed(*common, f"data.packing.micro_batch_rows={two.largest_rows}", "data.root=nowhere")
    ).memory.total
    above = make_plan(
        composed(*common, f"data.packing.micro_batch_rows={two.largest_rows + 1}", "data.root=nowhere")
    ).memory.total
    assert at <= room < above


@pytest.mark.parametrize("encoders", [DECODER_ALONE, pytest.param([], marks=pytest.mark.long)], ids=["small", "whole"])
def test_13b_on_512_gpus_from_the_command_line(encoders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = [str(REPOSITORY / "train.py"), *PAPER, *CLUSTER, *encoders, "plan=true", f"plan_for.out={out}"]
    command += ["stage.checkpointing=full", "stage.accumulate=1", "data.packing.micro_batch_rows=1", "output_dir=runs"]
    start = time.monotonic()
    result = run_script(command, tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 90
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]  # no run folder
    plan = json.loads(out.read_text())
    assert plan["fits"]
    assert plan["largest_rows"] >= 1
    assert plan["steps_per_epoch"] is None
    assert plan["engine"]["kind"] == "zero3"
    # 6 FLOPs a parameter of the decoder's blocks and position; the head, attention and encoders on top.
    tokens = 512 * 4096
    assert 6 * 12.68e9 * tokens < plan["flops_per_step"] < 1.4 * 6 * 13.0e9 * tokens
    assert plan["hours"] == pytest.approx(180000 * plan["flops_per_step"] / (512 * 989e12 * 0.4) / 3600)
    assert "The data could not be read" in " ".join(result.stdout.split())


def test_what_does_not_fit_says_what_would() -> None:
    cfg = composed(*PAPER, *DECODER_ALONE, "trainer=zero3", "trainer.devices=8", "plan_for.gpu=A100-40GB")
    plan = make_plan(cfg)
    assert not plan.fits
    assert plan.largest_rows == 0
    text = "\n".join(plan.advice)
    assert "GPUs with" in text
    assert "trainer=zero3_offload" in text


def test_data_that_is_there_is_looked_at(sample_data: Path) -> None:
    model = ["model=sphinx_sample", *SHALLOW_ENCODERS, "model.vision.encoders.convnext.depths=[1,1]"]
    model.append("model.decoder.layers=1")
    plan = make_plan(composed(*model, "trainer=cpu", f"data.root={sample_data}"))
    assert plan.content.source == "measured"
    assert 0.5 * plan.row_length < plan.content.tokens <= plan.row_length
    assert 0 < plan.content.supervised < plan.content.tokens
    # Each row holds several samples, and no position attends beyond its own.
    assert plan.content.tokens < plan.content.pairs < 0.9 * plan.row_length * (plan.row_length + 1) / 2
    assert plan.content.images > 0.5
    assert plan.content.image_bytes > 100
    assert plan.steps_per_epoch is not None
    assert plan.steps_per_epoch > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan_for.gpu=H100-80G"], "did you mean 'H100-80GB'"),
        (["plan_for.mfu=2"], "mfu"),
        (["stage.checkpointing=ful"], "did you mean 'full'"),
        (["stage.train_parts=[decodr]"], "did you mean 'decoder'"),
        (["trainer.devices=auto"], "give the number of devices"),
        (["plan_for.images_per_row=100"], "do not fit into"),
        (["++trainer.strategy=horovod"], "no memory model"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(composed("model=sphinx_sample", "data.root=nowhere", *overrides))


def test_states_under_zero3_are_shared_by_all_ranks() -> None:
    cfg = composed(*PAPER)
    config = SphinxConfig.from_dict(cfg.model)
    model = built(config, 1)
    model.freeze(["clip", "convnext", "dinov2", "qformer"])
    sizes = Sizes.of(model, config.decoder.layers)
    assert sizes.trained + sizes.frozen == sum(p.numel() for p in built(config).parameters())
    engine = Engine("zero3", nodes=4, per_node=8, precision="bf16-true")
    held, host = states(engine, sizes)
    assert host == 0
    assert held["master weights"] + held["optimizer"] == pytest.approx(12 * sizes.trained / 32, rel=1e-6)
    assert held["frozen weights"] == pytest.approx(2 * sizes.frozen * (1 + 1 / 32), rel=1e-6)
    away, host = states(
        Engine("zero3", nodes=4, per_node=8, precision="bf16-true", offload_optimizer="cpu", offload_weights="cpu"),
        sizes,
    )
    assert not set(away) & {"weights", "master weights", "optimizer", "gradients"}
    assert host == pytest.approx(22 * sizes.trained / 32, rel=1e-6)


def test_gathered_parameters_stay_below_the_live_ones() -> None:
    config = SphinxConfig.from_dict(composed(*PAPER).model)
    model = built(config, 1)
    model.freeze(["clip", "convnext", "dinov2", "qformer"])
    sizes = Sizes.of(model, config.decoder.layers)
    engine = Engine("zero3", nodes=4, per_node=8, precision="bf16-true")
    alone = gathered_by_zero3(Engine("zero3", prefetch=0, reuse=0, precision="bf16-true"), sizes, "none")
    largest = max(n for module in (*sizes.inputs, *sizes.block, *sizes.ends) for n in module)
    assert largest <= max(alone.values()) < 1.2 * largest  # a module at a time, and what is persistent
    assert max(alone.values()) < max(gathered_by_zero3(engine, sizes, "full").values()) < 2.5e9


def engine_of(**trainer: Any) -> Engine:
    return Engine.from_trainer(trainer)


def test_engines_are_read_from_the_trainer() -> None:
    assert engine_of(devices=1, precision="bf16-mixed").kind == "single"
    assert engine_of(devices=2, precision="32-true", accelerator="cpu").kind == "ddp"
    zero = Engine.from_trainer(
        {"devices": 8, "num_nodes": 4, "precision": "bf16-true"}
        | {"strategy": {"_target_": "a.Zero3", "frozen": "sharded", "zero": {"reduce_bucket_size": 1e6}}}
    )
    assert (zero.kind, zero.ranks, zero.frozen, zero.reduce_bucket) == ("zero3", 32, "sharded", 1_000_000)
    engine = Engine.from_trainer(trainer_section(composed("trainer=zero3_offload", "trainer.devices=8")))
    assert (engine.offload_optimizer, engine.offload_weights, engine.compute_precision) == ("cpu", "cpu", "bf16-true")
    engine = Engine.from_trainer(trainer_section(composed("trainer=fsdp2", "trainer.devices=8")))
    assert (engine.kind, engine.weight_bytes, engine.compute_precision) == ("fsdp2", 4, "bf16-true")


def test_every_gpu_is_found_by_what_its_driver_calls_it() -> None:
    for name, gpu in GPUS.items():
        assert flops_of_device(f"NVIDIA {gpu.name} something") == find_gpu(name).flops
