"""The examples of docs/extending.md as they stand there: each is run, and does what the page says of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image

from sphinx_pl.checkpoints.families import FAMILIES
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.huggingface import exported_family
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.prompt_formats import FORMATS
from sphinx_pl.data.readers import READERS
from sphinx_pl.data.readers.instruction_json import to_record
from sphinx_pl.data.sampling.config import SourceConfig
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.benchmarks import BENCHMARKS, choose
from sphinx_pl.evaluation.scorers.tasks import SCORERS
from sphinx_pl.mixing.methods import METHODS, mix_tensors
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.decoder import Decoder
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.overrides import compose_config
from sphinx_pl.utils.config import CONFIG_FOLDER
from sphinx_pl.utils.errors import UserError
from tests.cli.test_train import SMALL, losses
from tests.conftest import REPOSITORY, tiny_model
from tests.scripts import run_script

PAGE = REPOSITORY / "docs" / "extending.md"
REGISTRIES = (TASKS, FORMATS, READERS, BENCHMARKS, METHODS, FAMILIES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
FILES = {content.splitlines()[0].removeprefix("# "): content for _, content in BLOCKS if content.startswith("# ")}
"""What the first line of a block says -> the block."""
Load = Callable[[str], ModuleType]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries and modules are afterwards what they were."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(file)`: what importing the example of this file, which is not in the repository, would do."""

    def load(file: str) -> ModuleType:
        content = FILES[file]
        path = file.removesuffix(" (at its end)")
        assert (REPOSITORY / path).exists() == (path != file), "a file of an example is there"
        path = path if path.startswith("sphinx_pl/") else f"sphinx_pl/{path}"
        name = path.removesuffix(".py").replace("/", ".")
        if name in sys.modules:
            module = ModuleType(name)
            module.__dict__.update(vars(sys.modules[name]))
        else:
            module = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, last = name.rpartition(".")
            monkeypatch.setattr(sys.modules[parent], last, module, raising=False)
        exec(compile(content, str(PAGE), "exec"), module.__dict__)
        return module

    return load


def block(kind: str, words: str) -> str:
    """The one block of a kind that holds these words."""
    [content] = [content for language, content in BLOCKS if language == kind and words in content]
    return content


def test_every_section_has_an_example_of_some_length() -> None:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:-1]
    names = [section.partition("\n")[0] for section in sections]
    wanted = [
        "task",
        "prompt format",
        "reader",
        "benchmark",
        "encoder",
        "language model",
        "mixing method",
        "stage",
        "callback",
    ]
    assert names == [f"{'an' if name[0] in 'aeiou' else 'a'} {name}".capitalize() for name in wanted]
    for section in sections:
        code = "".join(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
        assert 12 <= len(code.splitlines()) <= 60, section.partition("\n")[0]


def test_a_task(load: Load, processor: Processor) -> None:
    load("sphinx_pl/data/tasks/wordings.py (at its end)")
    entry = json.loads(block("json", '"count"'))
    record = to_record(entry, "k", Path("/"), "chat")
    coordinates = Coordinates()
    (turn,) = TASKS["count"].turns(record, coordinates)
    assert (turn.question, turn.answer) == ("How many red squares are there?\nAnswer with a number.", "2")
    assert processor.sample(record, "train").targets > 0
    score = SCORERS[TASKS["count"].scorer].value
    assert [score(answer, record, coordinates) for answer in ("2", "3", "")] == [1, 0, 0]
    assert [TASKS["count"].parse(text, coordinates).formed for text in ("12", "a few")] == [True, False]
    with pytest.raises(SkipSample, match="question_empty"):
        TASKS["count"].turns(to_record(entry | {"question": " "}, "k", Path("/"), "chat"), coordinates)


def test_a_prompt_format(load: Load, processor: Processor) -> None:
    load("sphinx_pl/data/prompt_formats/turns.py (at its end)")
    entry = {"conversations": [{"from": "human", "value": "Hi<|end|>"}, {"from": "gpt", "value": "Hello"}]}
    record = to_record(entry, "k", Path("/"), "chat")
    phi3 = Processor(ProcessorConfig(prompt_format="phi3", max_length=64), processor.tokenizer, 3, 32)
    assert phi3.tokenizer.new_tokens == ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    [question] = phi3.sample(record, "train").questions
    end = phi3.tokenizer.controls["<|end|>"].id
    assert (question.ids.count(end), phi3.stop_sequences) == (2, [[end]])
    assert phi3.decode([id for id, target in zip(question.ids, question.supervised, strict=True) if target]) == "Hello"


def test_a_reader(load: Load, processor: Processor, tmp_path: Path) -> None:
    load("sphinx_pl/data/readers/coco_captions.py")
    (tmp_path / "train2017").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "train2017" / "1.jpg")
    pictures = [{"id": 1, "file_name": "1.jpg", "width": 40, "height": 20}]
    captions = [{"id": n, "image_id": image, "caption": f"Picture {n}."} for n, image in ((5, 1), (6, 1), (7, 2))]
    (tmp_path / "captions.json").write_text(json.dumps({"images": pictures, "annotations": captions}))
    values = yaml.safe_load(block("yaml", "kind: coco_captions"))
    values |= {"path": str(tmp_path / "captions.json"), "root": str(tmp_path / "train2017")}
    source = SourceConfig.from_dict("coco", values).open("coco")
    assert (len(source), source.skipped) == (2, {"image_unknown": 1})
    records = [source.record(index) for index in range(2)]
    assert [(record.key, record.answer) for record in records] == [
        ("captions.json/5", "Picture 5."),
        ("captions.json/6", "Picture 6."),
    ]
    assert source.open(0).images(0) == source.open(0).images(1)
    assert processor.sample(records[0], "coco").targets > 0
    with pytest.raises(UserError, match=r"has no option 'rot'.*root"):
        SourceConfig.from_dict("coco", values | {"rot": "x"}).open("coco")


def test_a_benchmark(load: Load, tmp_path: Path) -> None:
    load("sphinx_pl/evaluation/benchmarks/colours.py")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    lines = [{"image": "a.jpg", "question": "What colour is it?", "colour": colour} for colour in ("red", "blue")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"image": "a.jpg"}]))
    line = FILES["conf/benchmark/paper.yaml (at its end)"]
    values = yaml.safe_load(line.replace("${benchmark.root}/colours", str(tmp_path)))
    [questions], _ = choose(["colours"], values)
    assert questions.lost == {"entry_malformed": 1}
    predictions = [questions.benchmark.score_answer(record, "Red.", Coordinates()) for record in questions.records]
    assert [(p.score, p.parsed) for p in predictions] == [(1.0, True), (0.0, True)]
    assert not questions.benchmark.score_answer(questions.records[0], "mauve", Coordinates()).parsed


@pytest.mark.skipif(not (REPOSITORY / "sphinx_pl/models/encoders").is_dir(), reason="encoders have no registry yet")
def test_an_encoder(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    base = import_module("sphinx_pl.models.encoders.base")
    monkeypatch.setattr(base.ENCODERS, "_entries", dict(base.ENCODERS._entries))
    load("sphinx_pl/models/encoders/siglip.py")
    values = tiny_model().to_dict()
    values["vision"]["encoders"]["siglip"] = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 2}
    model = Sphinx(SphinxConfig.from_dict(values))
    assert "siglip" in model.parts()
    assert model.vision is not None
    tokens = model.vision(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    assert tokens.shape[1] == model.config.tokens_per_image
    (tokens * torch.randn_like(tokens)).sum().backward()  # a plain sum of normalised values has no gradient
    parameters = [parameter for parameter in model.part_parameters()["siglip"] if parameter.grad is not None]
    assert any(parameter.grad.abs().sum() > 0 for parameter in parameters)


def test_a_language_model(load: Load, tmp_path: Path) -> None:
    path = "conf/model/sphinx_3b.yaml"
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(FILES[path])
    cfg = compose_config(CONFIG_FOLDER, "train", [f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "model=sphinx_3b"])
    assert SphinxConfig.from_dict(cfg.model).decoder.head_dim == 100

    from transformers import MinistralConfig, MinistralForCausalLM

    load("sphinx_pl/checkpoints/families/ministral.py")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}
    types = ["sliding_attention", "full_attention"]
    theirs = MinistralForCausalLM(MinistralConfig(**sizes, layer_types=types, max_position_embeddings=64)).eval()
    theirs.save_pretrained(tmp_path / "ministral")
    checkpoint = open_checkpoint(tmp_path / "ministral")
    ours = Decoder(checkpoint.model_config.decoder).eval()
    checkpoint.load_into(ours, "decoder.")
    ids = torch.randint(96, (2, 11))
    with torch.no_grad():
        hidden = ours(ours.embed(ids), torch.arange(11).expand(2, -1))
        torch.testing.assert_close(ours.logits(hidden), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert exported_family(checkpoint, "ministral").architecture == "MinistralForCausalLM"


def test_a_mixing_method(load: Load) -> None:
    module = load("sphinx_pl/mixing/methods/trimmed_mean.py")
    tensors = [torch.tensor([value, 2.0, 7.0]) for value in (0.0, 1.0, 5.0, 100.0)]
    weights = METHODS["trimmed_mean"].weights(4, {"trim": 1})
    assert mix_tensors("trimmed_mean", tensors, weights).tolist() == [3.0, 2.0, 7.0]
    with pytest.raises(UserError, match=r"options.trim=2 leaves nothing"):
        module.equal_weights(4, {"trim": 2})
    with pytest.raises(UserError, match="no such option"):
        mix_tensors("trimmed_mean", tensors, weights, trimm=1)


def test_a_stage_and_a_callback(load: Load, sample_data: Path, tmp_path: Path) -> None:
    load("sphinx_pl/stages/head_start.py")
    load("callbacks/gap.py")
    for path in ("conf/stage/head_start.yaml", "conf/callbacks/gap.yaml"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(FILES[path])
    chosen = ["--config-dir", str(tmp_path / "conf"), "stage=head_start", "data/mixture=sample_demo_finetune"]
    chosen += ["callbacks=[default,gap]"]
    places = [f"output_dir={tmp_path / 'runs'}", f"data.root={sample_data}", "run=pretrain_real"]
    options = [*SMALL, "stage.init_from=null", "stage.max_steps=3", "stage.alone=2", "callbacks.gap.warn_at=-100"]
    done = run_script(["train.py", *chosen, *places, *options])
    assert done.returncode == 0, done.stderr
    assert "above the training loss" in done.stdout + done.stderr
    decoder = losses(tmp_path / "runs", "train/grad_norm/decoder")
    projections = losses(tmp_path / "runs", "train/grad_norm/projections")
    assert [float(decoder[step]) > 0 for step in (1, 2, 3)] == [False, False, True]
    assert all(float(projections[step]) > 0 for step in (1, 2, 3))
    assert losses(tmp_path / "runs", "val/gap")
    refused = run_script(["train.py", *chosen, *places, *options, "stage.alnoe=1"])
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "stage.alone" in refused.stderr
