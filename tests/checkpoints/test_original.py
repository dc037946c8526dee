"""The original's layout, and its numbers: `tests/golden/llama_ens.npz` was measured with its code (LLaMA2-Accessory,
commit 3777c43) on a CPU in float32, from weights that are a function of their names (`weight`)."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.checkpoints.original import (
    TYPES,
    Restored,
    decoder_config,
    original_type,
    our_name,
    their_infos,
    write_original,
)
from sphinx_pl.checkpoints.tensors import TensorDict, TensorInfo, copy_into, same_bits
from sphinx_pl.checkpoints.torch_shards import TorchShards, split
from sphinx_pl.cli.checkpoint import main as command
from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.schema import IMAGE_SLOT, ImageRef, Record, Turn
from sphinx_pl.generation.assistant import Assistant, Dialog
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate
from sphinx_pl.mixing.methods import mix_tensors
from sphinx_pl.mixing.mix import mix, needs_our_names
from sphinx_pl.mixing.plan import MixRecipe, open_models, plan_mixture
from sphinx_pl.models.encoders.clip import ClipViT
from sphinx_pl.models.encoders.convnext import map_to_tokens
from sphinx_pl.models.sphinx import Sphinx, packed_mask
from sphinx_pl.utils.errors import UserError
from tests.checkpoints.conftest import write_torch

GOLDEN = Path(__file__).parent.parent / "golden"
IMAGE_WORDS = 291
LEFTOVERS = {
    "llma.dinov2_vitg14.mask_token",
    *(f"llma.clip.{name}" for name in ("positional_embedding", "text_projection", "token_embedding.weight")),
    *(f"llma.clip.ln_final.{name}" for name in ("weight", "bias")),
}
Write = Callable[..., Path]


def weight(name: str, shape: list[int]) -> Tensor:
    """The random weight behind the golden numbers: normal, seeded and scaled by its name, in bfloat16."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if "_img" in name:
        scaled = x
    elif len(shape) == 1:
        scaled = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
    elif "tok_embeddings" in name:
        scaled = 0.5 * x
    else:
        gain = 3.0 if name == "llma.output.weight" else 1.5 if name.endswith(("wq.weight", "wk.weight")) else 1.0
        scaled = x * gain * shape[1] ** -0.5
    return scaled.bfloat16()


def shapes() -> dict[str, list[int]]:
    """Everything but the encoders of the golden model."""
    width, ffn, result = 256, 704, {"llma.start_img": [1, 1, 256], "llma.end_img": [1, 1, 256]}
    for name in ("tok_embeddings", "output"):
        result[f"llma.{name}.weight"] = [512, width]
    for layer in (f"llma.layers.{i}" for i in range(2)):
        result |= {f"{layer}.attention.w{letter}.weight": [width, width] for letter in "qkvo"}
        result |= {f"{layer}.feed_forward.w{i}.weight": [width, ffn] if i == 2 else [ffn, width] for i in (1, 2, 3)}
        result |= {f"{layer}.{name}.weight": [width] for name in ("attention_norm", "ffn_norm")}
    result["llma.norm.weight"] = [width]
    for name, inputs in (("visual_proj", 5632), ("qformer_proj", 768)):
        result |= {f"llma.{name}.0.weight": [width, inputs]}
        result |= {f"llma.{name}.{end}": [width] for end in ("0.bias", "1.weight", "1.bias")}
    return result


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A folder in the original's layout with the golden model's decoder and projections, without encoders."""

    def write(shards: int = 1, extra: dict[str, Tensor] | None = None, kind: str = "llama_ens") -> Path:
        folder = tmp_path / f"original-{shards}"
        folder.mkdir()
        state = {name: weight(name, shape) for name, shape in shapes().items()} | (extra or {})
        for rank in range(shards):
            part = {name: split(name, value, shards)[rank].clone() for name, value in state.items()}
            torch.save({"model": part}, folder / f"consolidated.{rank:02d}-of-{shards:02d}.model.pth")
        sizes: dict[str, Any] = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": None, "vocab_size": 512}
        sizes |= {"multiple_of": 32, "ffn_dim_multiplier": None, "norm_eps": 1e-5, "rope_theta": 10000}
        (folder / "config.json").write_text(json.dumps(sizes | {"max_seq_len": 4096}))
        (folder / "meta.json").write_text(json.dumps({"llama_type": kind}))
        shutil.copy(GOLDEN / "tokenizer.model", folder)
        return folder

    return write


class Given(nn.Module):
    """An encoder that has seen the image already."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def views(self, pixels: Tensor) -> Tensor:
        return torch.empty(len(pixels), 1, 0)

    def forward(self, views: Tensor) -> Tensor:
        return self.tokens.expand(len(views), -1, -1)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "llama_ens.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


@pytest.fixture
def sphinx(write: Write, golden: dict[str, Tensor]) -> Sphinx:
    """The golden model behind its encoders, whose outputs for image a are given."""
    checkpoint = open_checkpoint(write())
    config = checkpoint.model_config
    assert config.vision is not None
    depth = {"clip": {"layers": 1}, "convnext": {"depths": [1] * 4}, "dinov2": {"layers": 1}}
    depth["qformer"] = {"layers": 1, "vision_layers": 1}
    encoders = {key: dataclasses.replace(config.vision.encoders[key], **depth[key]) for key in depth}  # for a moment
    vision = dataclasses.replace(config.vision, encoders=encoders)
    with torch.device("meta"):
        model = Sphinx(dataclasses.replace(config, vision=vision))
    assert model.mixer is not None
    towers = {key: golden[f"tower_{key}"] for key in ("clip", "dinov2", "qformer")}
    towers["convnext"] = map_to_tokens(golden["tower_convnext"], times=2)
    model.mixer.towers = nn.ModuleDict({key: Given(towers[key]) for key in model.mixer.towers})
    model.to_empty(device="cpu")
    copy_into(model.state_dict(), ((name, checkpoint.tensor(name)) for name in checkpoint))
    return model.eval()


@pytest.fixture
def processor(write: Write) -> Processor:
    checkpoint = open_checkpoint(write(shards=2))
    return Processor.from_dict(checkpoint.processor, checkpoint.tokenizer_file, checkpoint.model_config)


def dialog(image: str, *turns: tuple[str, str]) -> Record:
    return Record(image, "chat", (ImageRef(str(GOLDEN / image)),), turns=tuple(Turn(*turn) for turn in turns))


DIALOGS = (
    dialog(
        "image_a.png",
        ("<image>\nWhat shapes are in the picture?", "There is a red circle, a blue square and a green triangle."),
    ),
    dialog(
        "image_b.png",
        ("What is written in the image?", "The word NILE is written in white."),
        ("Where is the yellow ellipse?\n<image>", "It is on the left side, below the purple line."),
    ),
)


def assert_near(result: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    """The largest difference, relative to the expected values' own spread."""
    assert result.shape == expected.shape
    assert float((result.detach() - expected).abs().max() / expected.std()) < relative


def test_shards_are_merged_bit_for_bit(write: Write) -> None:
    whole, *split_up = (open_checkpoint(write(shards)) for shards in (1, 2, 4, 8))
    for name in whole:
        for parts in split_up:
            assert parts.info(name) == whole.info(name)
            assert torch.equal(parts.tensor(name), whole.tensor(name)), name
            assert parts.tensor(name).shape == whole.info(name).shape
    assert whole.model_config.decoder.ffn_width == 704
    assert whole.model_config.tokens_per_image == IMAGE_WORDS


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_to_our_format_and_back_is_bit_for_bit(write: Write, tmp_path: Path, shards: int) -> None:
    pool = torch.randn(1024, 769)  # their storage may be shared
    unused = {"llma.clip.logit_scale": pool[0, 0], "llma.clip.visual.proj": pool[:, 1:]}
    theirs = write(shards, extra=unused)
    before = open_checkpoint(theirs)
    ours = write_checkpoint(
        tmp_path / "ours",
        before,
        before.config["model"],
        before.processor,
        before.tokenizer_file,
        {"stage": "import"},
        unused=before.unused(),
    )
    assert write_original(open_checkpoint(ours), tmp_path / "again", shards) == "llama_ens"
    for rank in range(shards):
        name = f"consolidated.{rank:02d}-of-{shards:02d}.model.pth"
        old, new = (torch.load(folder / name, weights_only=True)["model"] for folder in (theirs, tmp_path / "again"))
        assert old.keys() <= new.keys()
        for key, value in new.items():
            if key in old:
                assert value.dtype == old[key].dtype
                assert torch.equal(value, old[key]), key
            else:
                assert not value.any(), key
        assert {key for key in new if key not in old} == LEFTOVERS
    with pytest.raises(UserError, match="8 key/value heads, not a multiple of 16"):
        write_original(open_checkpoint(ours), tmp_path / "many", 16)
    repeat = open_checkpoint(tmp_path / "again")
    assert repeat.model_config == before.model_config
    assert repeat.tokenizer_file.read_bytes() == before.tokenizer_file.read_bytes()


def test_image_tokens(sphinx: Sphinx, golden: dict[str, Tensor]) -> None:
    tokens = sphinx.embed_images(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert_near(tokens[:, 1:-1], golden["image_tokens_a"][0])
    assert torch.equal(tokens[0, 0], weight("llma.start_img", [1, 1, 256]).float()[0, 0])


def test_ids_labels_and_pixels(processor: Processor, golden: dict[str, Tensor]) -> None:
    for number, record in enumerate(DIALOGS):
        (question,) = processor.sample(record, "golden").questions
        text = [(token, label) for token, label in zip(question.ids, question.supervised, strict=True) if token >= 0]
        assert len(question.ids) - len(text) == IMAGE_WORDS
        examples, labels = golden["examples"][number], golden["labels"][number]
        assert [token for token, _ in text] == examples[: len(text)].tolist()
        assert [token if label else 0 for token, label in text] == labels[
            : len(text)
        ].tolist()  # the original's "ignore"
        # The original ends with a token that nothing supervises and nothing attends to: eos.
        assert examples[len(text)] == processor.tokenizer.eos_id
        assert not examples[len(text) + 1 :].any()
        assert not labels[len(text) :].any()
        assert torch.equal(load_image(record.images[0], 224), golden["pixels"][number])


def test_logits_loss_and_gradients(sphinx: Sphinx, processor: Processor, golden: dict[str, Tensor]) -> None:
    sample = processor.sample(DIALOGS[0], "golden")
    batch = Collator(sample.length, 224)([[sample]])
    x, _ = sphinx._embed(batch)
    hidden = sphinx.decoder(x, batch.position_ids)
    logits = sphinx.decoder.logits(hidden)[:, IMAGE_WORDS:]
    assert_near(logits, golden["logits_a"][:, : logits.shape[1]])
    loss = sphinx.token_losses(batch).nll.mean()
    assert float(loss.detach()) == pytest.approx(float(golden["loss_a"]), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = dict(sphinx.named_parameters())
    for name in ("start_img", "end_img", "visual_proj.0.bias", "visual_proj.1.weight", "qformer_proj.1.bias"):
        gradient = parameters[f"mixer.{name}"].grad
        assert gradient is not None
        assert_near(gradient, golden[f"grad/llma.{name}"].flatten())
    gradient = parameters["decoder.tok_embeddings.weight"].grad
    assert gradient is not None
    assert_near(gradient, golden["grad/llma.tok_embeddings.weight"])
    norms = {name: golden[name] for name in golden if name.startswith("norm/")}
    assert len(norms) == 31
    for name, norm in norms.items():
        ours = name.removeprefix("norm/llma.")
        parameter = parameters.get(f"mixer.{ours}", parameters.get(f"decoder.{ours}"))
        assert parameter is not None
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) == pytest.approx(float(norm), rel=1e-4), name


@pytest.mark.parametrize("with_image", [True, False])
def test_greedy_tokens(sphinx: Sphinx, processor: Processor, golden: dict[str, Tensor], with_image: bool) -> None:
    question = Turn("What's in the image?", "")
    images = (ImageRef(str(GOLDEN / "image_a.png")),) if with_image else ()
    ids = processor.prompt(Record("a", "chat", images, turns=(Turn(question.question, "-"),))).ids
    assert [i for i in ids if i >= 0] == golden["prompt_ids"].tolist()
    pixels = torch.zeros(1, 3, 224, 224, dtype=torch.uint8) if with_image else None
    (result,) = generate(sphinx, [Prompt(ids, pixels)], GenerationConfig(max_new_tokens=16))
    assert result == golden["gen_a" if with_image else "gen_text_only"].tolist()


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['HOSTILE']}",)


def test_a_hostile_pickle_is_refused_and_executes_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTILE", str(tmp_path / "executed"))
    folder = write()
    shard = folder / "consolidated.00-of-01.model.pth"
    torch.save({"model": {"llma.norm.weight": Hostile()}}, shard)
    with pytest.raises(UserError, match="something else than tensors"):
        open_checkpoint(folder)
    shard.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="consolidated"):
        open_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


with gzip.open(GOLDEN / "names.json.gz") as file:
    NAMES = json.load(file)
    """Of each type the original's config.json (with a tiny decoder) and family, of each family name -> shape, split."""


def unwritten(file: Path, content: Any) -> None:
    """A file of torch.save with holes instead of values: full-size encoders without their bytes."""
    with skip_data(materialize_fake_tensors=True):
        torch.save(content, file)


@pytest.mark.parametrize("kind", NAMES["types"])
def test_every_types_names_shapes_and_splits(tmp_path: Path, kind: str) -> None:
    theirs, ranks = NAMES["tensors"][NAMES["types"][kind]["family"]], 2
    experts = NAMES["types"][kind]["config"].get("moe", {}).get("num_experts", 0)
    with FakeTensorMode():
        parts: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
        for name, (shape, dimension) in theirs.items():
            whole = torch.empty(shape, dtype=torch.bfloat16)
            result = split(name, whole, ranks, experts)
            if dimension is None:
                assert [part.shape for part in result] == [whole.shape] * ranks, name
            else:  # experts are split inside, which leaves the shape of a split along 0
                assert result[0].shape == whole.chunk(ranks, dim=0 if dimension == "experts" else dimension)[0].shape
            for rank, part in enumerate(result):
                parts[rank][name] = torch.empty(part.shape, dtype=torch.bfloat16)
    for rank, part in enumerate(parts):
        unwritten(tmp_path / f"consolidated.{rank:02d}-of-{ranks:02d}.model.pth", {"model": part})
    (tmp_path / "config.json").write_text(json.dumps(NAMES["types"][kind]["config"]))
    (tmp_path / "meta.json").write_text(json.dumps({"llama_type": kind}))
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)

    checkpoint = open_checkpoint(tmp_path)
    with torch.device("meta"):
        model = Sphinx(checkpoint.model_config)
    checkpoint.check(model)
    assert original_type(checkpoint) == kind
    assert their_infos(checkpoint) == {name: TensorInfo(tuple(s), torch.bfloat16) for name, (s, _) in theirs.items()}


def test_differences_are_added_to_their_base(write: Write, tmp_path: Path) -> None:
    tuned = write(2)
    base = tmp_path / "llama-2"
    base.mkdir()
    names = [name for name in shapes() if "proj" not in name and "_img" not in name]
    generator = torch.Generator().manual_seed(0)
    before = {name: torch.randn(shapes()[name], generator=generator).half() for name in names}
    for rank in range(2):
        part = {name.removeprefix("llma."): split(name, value, 2)[rank].clone() for name, value in before.items()}
        torch.save(part, base / f"consolidated.{rank:02d}.pth")
        file = tuned / f"consolidated.{rank:02d}-of-02.model.pth"
        file.rename(tuned / f"consolidated.{rank:02d}-of-02.model-diff.pth")
    shutil.copy(tuned / "config.json", base / "params.json")
    shutil.copy(tuned / "tokenizer.model", base)

    delta = open_checkpoint(tuned)
    with torch.device("meta"):
        model = Sphinx(delta.model_config)
    with pytest.raises(UserError, match="--base"):
        delta.check(model)
    with pytest.raises(UserError, match="leave out --base"):
        Restored(open_checkpoint(base), delta)
    restored = Restored(delta, open_checkpoint(base))
    assert list(restored) == list(delta)
    for name, shape in shapes().items():
        difference, ours = weight(name, shape), our_name(name)
        expected = (difference.float() + before[name].float()).bfloat16() if name in before else difference
        assert torch.equal(restored.tensor(ours).view(shape), expected), name
    (base / "params.json").write_text((base / "params.json").read_text().replace('"dim": 256', '"dim": 128'))
    half = {name.removeprefix("llma."): value[..., :128].clone() for name, value in before.items()}
    torch.save(half, base / "consolidated.00.pth")
    (base / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match="is not the base of"):
        Restored(delta, open_checkpoint(base))


def test_it_says_which_of_the_originals_defects_it_reproduces(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint(write())
    assert checkpoint.model_config.vision is not None
    assert not checkpoint.model_config.vision.encoders["clip"].quick_gelu
    assert checkpoint.model_config.vision.half_resize
    with torch.device("meta"):
        model = Sphinx(checkpoint.model_config)
    checkpoint.load_into(model.decoder.to_empty(device="cpu"), "decoder.")
    assert "exact GELU" in caplog.text


@pytest.mark.parametrize("kind", ["llama_ens_light", "mixtral_sparse_ens", "mixtral_sparse_ens5"])
def test_what_config_json_leaves_out_is_the_originals_default(kind: str) -> None:
    sizes = NAMES["types"][kind]["config"]
    optional = {"norm_eps", "rope_theta", "load_balancing_weight", "max_seq_len", "rope_scaling", "max_batch_size"}
    bare = {key: value for key, value in sizes.items() if key not in optional}
    assert decoder_config(bare, 512, kind) == decoder_config(sizes, 512, kind)
    if kind.startswith("mixtral"):
        del bare["moe"]
        assert decoder_config(bare, 512, kind).experts == 8
        assert decoder_config(bare, 512, kind).rope_theta == 1e6


@pytest.mark.parametrize("kind", TYPES)
def test_an_image_and_a_question_fit_into_every_types_own_limits(kind: str, tmp_path: Path) -> None:
    """With the shapes that decide it: the vision part as it is shipped, a decoder of one tensor."""
    sizes = NAMES["types"].get(kind, NAMES["types"]["llama_ens"])["config"]
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "meta.json").write_text(json.dumps({"llama_type": kind}))
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)
    torch.save(
        {"model": {"llma.tok_embeddings.weight": torch.zeros(512, 8)}}, tmp_path / "consolidated.00-of-01.model.pth"
    )
    checkpoint = open_checkpoint(tmp_path)
    processor = Processor.from_dict(checkpoint.processor, checkpoint.tokenizer_file, checkpoint.model_config)
    positions, length = checkpoint.model_config.decoder.max_positions, processor.config.max_length
    assert positions == sizes["max_seq_len"]
    assert length == min(positions, processor.tokens_per_image + 2048)
    sample = processor.sample(DIALOGS[0], "s")
    assert sample.questions[0].ids.count(IMAGE_SLOT) == checkpoint.model_config.tokens_per_image
    prompt = processor.prompt(DIALOGS[0])
    assert len(prompt.ids) + 512 <= positions


def test_files_of_different_models_are_named(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(2)
    file = folder / "consolidated.01-of-02.model.pth"
    model = torch.load(file, weights_only=True)["model"]
    other = model | {"llma.layers.0.attention.wq.weight": torch.zeros(128, 255, dtype=torch.bfloat16)}
    torch.save({"model": other}, file)
    with pytest.raises(UserError, match=r"disagree about 'llma\.layers\.0\.attention\.wq\.weight'"):
        open_checkpoint(folder)
    torch.save({"model": model | {"llma.norm.weight": torch.zeros(256, dtype=torch.bfloat16)}}, file)
    open_checkpoint(folder).tensor("decoder.norm.weight")
    assert "'llma.norm.weight' differs between the ranks" in caplog.text


def test_what_is_not_whole_is_not_exported(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for layout in ("huggingface", "original"):
        assert command(["export", str(write()), str(out), "--to", layout]) == 2
        assert "missing: 'mixer.towers.clip" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "original-1")
    assert not out.exists()


def test_a_full_disk_is_said_before_anything_is_written(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"disk has 1\.0 kB left"):
        write_original(checkpoint, tmp_path / "out")
    with pytest.raises(UserError, match=r"disk has 1\.0 kB left"):
        write_checkpoint(tmp_path / "out", checkpoint, {}, {}, checkpoint.tokenizer_file, {})
    assert not list(tmp_path.glob("*out*"))


def test_our_folders_are_mixed_into_the_originals_files(write: Write, tmp_path: Path) -> None:
    """`layout=original shards=2`: as if the mixture had been made of the original's own folders of two files."""
    theirs = open_checkpoint(write(shards=1))
    tensors = [{name: theirs.tensor(name) for name in theirs}]
    tensors.append({name: tensor + tensor.roll(1, 0) for name, tensor in tensors[0].items()})
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, values in zip(paths, tensors, strict=True):
        write_checkpoint(path, values, theirs.config["model"], theirs.config["processor"], theirs.tokenizer_file, {})
    models, _ = open_models(paths, own=not needs_our_names(paths, "original", 2))
    mix(plan_mixture(models, None, MixRecipe([0.25, 0.75])), tmp_path / "mixed", layout="original", shards=2)

    names = [f"consolidated.0{rank}-of-02.model.pth" for rank in range(2)]
    assert sorted(path.name for path in (tmp_path / "mixed").glob("*.pth")) == names
    parts = [torch.load(tmp_path / "mixed" / name, mmap=True)["model"] for name in names]
    assert parts[0].keys() == parts[1].keys() >= shapes().keys()  # and what of the encoders no model here uses
    assert [part["llma.layers.0.attention.wq.weight"].shape[0] for part in parts] == [128, 128]
    mixed = open_checkpoint(tmp_path / "mixed")
    assert set(mixed) == set(theirs)
    for name in mixed:
        assert same_bits(mixed.tensor(name), mix_tensors("linear", [t[name] for t in tensors], [0.25, 0.75])), name
    assert mixed.provenance["mixing"]["weights"] == [0.25, 0.75]


def test_an_unknown_tensor_is_named(write: Write) -> None:
    checkpoint = open_checkpoint(write(extra={"llma.layers.0.adapter.weight": torch.zeros(2)}))
    assert "decoder.layers.0.adapter.weight" in list(checkpoint)
    with torch.device("meta"):
        model = Sphinx(checkpoint.model_config)
    with pytest.raises(UserError, match=r"decoder\.layers\.0\.adapter\.weight"):
        checkpoint.load_into(model)


def test_mistakes(write: Write) -> None:
    folder = write(shards=2)
    (folder / "consolidated.01-of-02.model.pth").rename(folder / "consolidated.01-of-02.model.pth.part")
    with pytest.raises(UserError, match=r"consolidated\.01-of-02\.model\.pth' is missing"):
        open_checkpoint(folder)
    (folder / "consolidated.01-of-02.model.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(folder)
    (folder / "meta.json").write_text('{"llama_type": "llama_ens6"}')
    with pytest.raises(UserError, match=r"llama_type .llama_ens6. cannot be read"):
        open_checkpoint(folder)


EXPERTS_MEMORY = """
import sys
from pathlib import Path
from sphinx_pl.checkpoints.output import SafetensorsOutput, copies
from sphinx_pl.checkpoints.torch_shards import TorchShards
from sphinx_pl.checkpoints.writer import write_file
files = TorchShards(sorted(Path(sys.argv[1]).glob("*.pth")), lambda content: content, experts=8)
out = Path(sys.argv[1]) / "out.safetensors"
write_file(out, SafetensorsOutput(out.name, copies(files)), files)
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.long
def test_memory_of_mixtrals_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = (8 * 14336, 4096)
    infos = {
        f"layers.0.feed_forward.{w}": TensorInfo((shape[0] // 2, shape[1]), torch.bfloat16) for w in ("w1", "w2", "w3")
    }
    for rank in range(2):
        ones = {name: torch.ones(1, dtype=info.dtype).expand(info.shape) for name, info in infos.items()}
        write_torch(tmp_path / f"{rank}.pth", TensorDict(ones))
    script = [sys.executable, "-c", EXPERTS_MEMORY, str(tmp_path)]
    peak = 1024 * int(subprocess.check_output(script, text=True))
    largest = TensorInfo(shape, torch.bfloat16).nbytes
    with capsys.disabled():
        print(f"\npeak {peak / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
    assert peak < 2e9 + largest


FAMILIES = ("llama_ens", "llama_ens_light", "mixtral_sparse_ens")


def reference_folder() -> Path:
    """SPHINX_REFERENCE names the folder with the original's measured outputs and the script that makes its weights."""
    folder = Path(os.environ.get("SPHINX_REFERENCE", "reference"))
    if not (folder / "make_checkpoint.py").is_file():
        pytest.skip("SPHINX_REFERENCE does not name a folder with make_checkpoint.py")
    return folder


def make_released(reference: Path, kind: str, out: Path, shards: int) -> Path:
    script = [sys.executable, str(reference / "make_checkpoint.py"), kind, str(out)]
    subprocess.run([*script, "--shards", str(shards)], check=True)
    return out


@pytest.mark.long
@pytest.mark.parametrize("kind", FAMILIES)
def test_full_size_round_trip_is_bit_for_bit(tmp_path: Path, kind: str) -> None:
    theirs = make_released(reference_folder(), kind, tmp_path / "released", shards=2)
    assert command(["import", str(theirs), str(tmp_path / "ours")]) == 0
    experts = NAMES["types"][kind]["config"].get("moe", {}).get("num_experts", 0)

    def files(folder: Path) -> TorchShards:
        return TorchShards(sorted(folder.glob("*.pth")), lambda content: content["model"], experts)

    before = files(theirs)
    for shards in ("2", "1"):
        back = tmp_path / "back"
        assert command(["export", str(tmp_path / "ours"), str(back), "--to", "original", "--shards", shards]) == 0
        after = files(back)
        assert len(after.files) == int(shards)
        assert set(after) == set(before)
        for name in before:
            assert torch.equal(after.tensor(name), before.tensor(name)), name
        shutil.rmtree(back)
    shutil.rmtree(tmp_path / "ours")

    # Every type of this family answers from its folder alone, which meta.json names.
    family = {k: t["config"] for k, t in NAMES["types"].items() if t["family"] == NAMES["types"][kind]["family"]}
    pooled = {"llama_ens5p2": family["llama_ens5"]} if kind == "llama_ens" else {}
    for name, sizes in (family | pooled).items():
        (theirs / "meta.json").write_text(json.dumps({"llama_type": name}))
        (theirs / "config.json").write_text(json.dumps(sizes))
        assistant = Assistant.load(theirs, "cpu", "bf16")
        dialog = Dialog("What's in the image?", images=[GOLDEN / "image_a.png"])
        assert len(assistant.generate([dialog], GenerationConfig(max_new_tokens=4))) == 1


@pytest.mark.long
def test_whole_path_with_full_size_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = reference_folder()
    checkpoint = open_checkpoint(make_released(reference, "llama_ens", tmp_path / "released", shards=2))
    model = Sphinx(checkpoint.model_config)
    checkpoint.load_into(model)
    assert model.mixer is not None
    model.freeze(model.mixer.towers)
    model.eval()
    processor = Processor.from_dict(checkpoint.processor, checkpoint.tokenizer_file, checkpoint.model_config)
    with np.load(reference / "llama_ens.npz") as stored:
        measured = {name: torch.from_numpy(stored[name]) for name in stored}
    with np.load(reference / "llama_ens_grad.npz") as stored:
        measured |= {f"a/{name}": torch.from_numpy(stored[name]) for name in stored}
    figures: list[str] = []

    def check(name: str, result: Tensor, expected: Tensor) -> None:
        difference = (result.detach() - expected).abs() / expected.std()
        figures.append(f"{name:40} largest {float(difference.max()):.1e}  mean {float(difference.mean()):.1e}")
        assert_near(result.detach(), expected)

    pixels = torch.stack([load_image(record.images[0], 224) for record in DIALOGS])
    clip = model.mixer.encoders["clip"]
    check("pixels", clip.views(pixels).flatten(0, 1), measured["pixel_values"])
    with torch.inference_mode():
        view = clip.views(pixels[:1]).flatten(0, 1)
        for key, encoder in model.mixer.encoders.items():
            expected = measured[f"tower_{key}"]
            tokens = model.mixer.encode(encoder, pixels[:1])
            check(f"encoder {key}", tokens, map_to_tokens(expected, 2) if key == "convnext" else expected)
        check("image tokens", model.embed_images(pixels)[:, 1:-1], measured["image_tokens_ab"][:, 0])

    samples = [processor.sample(record, "reference") for record in DIALOGS]
    collate = Collator(max(sample.length for sample in samples), 224)
    batch = collate([[sample] for sample in samples])
    x, _ = model._embed(batch)
    logits = model.decoder.logits(
        model.decoder(x, batch.position_ids, packed_mask(batch.segment_ids, batch.question_ids))
    )
    for row, sample in enumerate(samples):
        length = sample.length - IMAGE_WORDS
        check(f"logits {row}", logits[row, IMAGE_WORDS : sample.length], measured["logits_ab"][row, :length])
    loss = model.token_losses(batch).nll.mean()
    check("loss", torch.stack([loss, 0 * loss]), torch.stack([measured["loss"], torch.tensor(0.0)]))
    model.token_losses(collate([[samples[0]]])).nll.mean().backward()  # type: ignore[no-untyped-call]
    parameters = dict(model.named_parameters())
    for name in measured:
        if name.startswith("a/grad/"):
            parameter = parameters[our_name(name.removeprefix("a/grad/"))]
            assert parameter.grad is not None
            check(name, parameter.grad, measured[name].view_as(parameter))

    questions = ("What's in the image?", "Where is the yellow ellipse? Say it in a few words.")
    prompts = []
    for record, question, image, limit in zip(DIALOGS, questions, pixels, (32, 16), strict=True):
        ids = processor.prompt(dataclasses.replace(record, turns=(Turn(question, "-"),))).ids
        prompts.append(Prompt(ids, image[None], max_new_tokens=limit))
    answers = generate(model, prompts, GenerationConfig())
    assert answers == [measured[f"gen_ab/ids_{row}"].tolist() for row in range(2)]

    # Without images, and with the images resized as is right instead of in float16.
    texts = []
    for record in DIALOGS:
        turns = tuple(Turn(turn.question.replace("<image>", "").strip(), turn.answer) for turn in record.turns)
        texts.append(processor.sample(dataclasses.replace(record, images=(), turns=turns), "reference"))
    batch = Collator(max(sample.length for sample in texts), 224)([[sample] for sample in texts])
    loss = model.token_losses(batch).nll.mean().detach()
    check("loss of text alone", torch.stack([loss, 0 * loss]), torch.stack([measured["loss_text_only"], 0 * loss]))
    assert checkpoint.model_config.vision is not None
    vision = dataclasses.replace(checkpoint.model_config.vision, half_resize=False)
    with torch.device("meta"):
        plain = Sphinx(dataclasses.replace(checkpoint.model_config, vision=vision)).eval()
    plain.load_state_dict(model.state_dict(), assign=True)
    with torch.inference_mode():
        tokens = plain.embed_images(pixels[:1])
        check("image tokens, float32 resizing", tokens[:, 1:-1], measured["nohalf/image_tokens_a"][0])
        batch = collate([[samples[0]]])
        x, _ = plain._embed(batch)
        mask = packed_mask(batch.segment_ids, batch.question_ids)
        logits = plain.decoder.logits(plain.decoder(x, batch.position_ids, mask))[0]
        length = samples[0].length
        check(
            "logits, float32 resizing",
            logits[IMAGE_WORDS:length],
            measured["nohalf/logits_a"][0, : length - IMAGE_WORDS],
        )
        moved = (measured["nohalf/logits_a"] - measured["logits_a"])[0, : length - IMAGE_WORDS].abs().max()
        figures.append(f"float16 resizing moves logits by {float(moved):.1e} at most")
        assert isinstance(clip, ClipViT)
        exact = clip(view)
        for block in clip.model.transformer.resblocks:
            block.mlp.gelu = QuickGELU()
        moved = (clip(view) - exact).abs()
        figures.append(f"QuickGELU moves CLIP's tokens by {float(moved.mean()):.4f}, {float(moved.max()):.3f} at most")
    with capsys.disabled():  # for the log
        print("", *figures, sep="\n")
