"""The published recipe's experiments: they compose, say the published numbers, and run on files in official form."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from sphinx_pl.cli.convert import main as convert
from sphinx_pl.cli.data import main as look
from sphinx_pl.data.converters import CONVERTERS
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.prompt_formats import SYSTEM
from sphinx_pl.data.readers.filters import PairFilters
from sphinx_pl.data.sampling.config import META, Group, SourceConfig
from sphinx_pl.data.sampling.packing import PackingConfig
from sphinx_pl.data.sampling.partition import Partition
from sphinx_pl.data.schema import IGNORE, ImageRef, Sample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.data.train_loader import TrainLoader
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY
from tests.examples import EXAMPLES

STAGES = {
    "paper_pretrain_real": "pretrain_real",
    "paper_pretrain_synthetic": "pretrain_synthetic",
    "paper_finetune": "finetune",
}
MORE = ("experiment=paper_finetune", "data/mixture=paper_finetune_more")
DOC = (REPOSITORY / "docs" / "data.md").read_text()
# Converters that the paper's list of tasks has no data for.
NOT_LISTED = {"coco_captions", "textvqa", "vizwiz", "scienceqa", "iconqa", "vsr", "clevr"}


def composed(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg: DictConfig = compose("train", overrides=list(overrides))
        return cfg


def data_of(*overrides: str) -> dict[str, Any]:
    values: dict[str, Any] = OmegaConf.to_container(composed(*overrides).data, resolve=True)  # type: ignore[assignment]
    return values


def leaves(data: dict[str, Any]) -> dict[str, SourceConfig]:
    return dict(Group.from_dict({"sources": data["sources"]}).leaves())


# --- what the configuration says


@pytest.mark.parametrize("experiment", STAGES)
def test_an_experiment_brings_its_stage_model_and_mixture(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}")
    assert cfg.stage.name == STAGES[experiment]
    assert cfg == composed(f"experiment={experiment}", f"stage={STAGES[experiment]}")
    assert cfg.name == "paper"
    assert SphinxConfig.from_dict(cfg.model).tokens_per_image == 291
    assert cfg.data.processor.system == SYSTEM
    assert build(ProcessorConfig, cfg.data.processor, "data.processor").decimals == 3
    assert build(PackingConfig, cfg.data.packing, "data.packing").row_length == 4096


def test_each_stage_starts_from_the_one_before() -> None:
    starts = [composed(f"experiment={experiment}").stage.init_from for experiment in STAGES]
    assert starts == [None, "outputs/paper/pretrain_real/model", "outputs/paper/mixed"]


@pytest.mark.parametrize("overrides", [*((f"experiment={name}",) for name in STAGES), MORE])
def test_sources_are_valid_and_shares_sum_to_one(overrides: tuple[str, ...]) -> None:
    data = data_of(*overrides)
    group = Group.from_dict({"sources": data["sources"]})
    configs = dict(group.leaves())
    held_out = {name: SourceConfig.from_dict(name, values) for name, values in data["val_sources"].items()}
    assert sum(group.shares(dict.fromkeys(configs, 1000)).values()) == pytest.approx(1)
    for name, config in [*configs.items(), *held_out.items()]:
        assert config.path.startswith("data/paper/"), name
        build(PairFilters, config.options.get("filters", {}), name)
        assert str(config.options.get("root", "data/paper/images/")).startswith("data/paper/images/")
    assert {config.modality for config in configs.values()} == {"image", "text"}
    if "more" not in data["sources"]:  # which comes on top of these
        assert sum(source["weight"] for source in data["sources"].values() if source) == pytest.approx(1)


def test_the_mixture_has_every_data_set_of_the_recipe() -> None:
    def converted(*overrides: str) -> set[str]:
        files = [Path(config.path).name for config in leaves(data_of(*overrides)).values()]
        assert all(re.fullmatch(r".+-train\.jsonl", file) for file in files)
        return {file.removesuffix("-train.jsonl") for file in files}

    assert converted("experiment=paper_finetune") == set(CONVERTERS) - NOT_LISTED
    assert converted(*MORE) == set(CONVERTERS)


@pytest.mark.parametrize("experiment", ["paper_pretrain_real", "paper_pretrain_synthetic"])
def test_pretraining_has_the_reported_schedule(experiment: str) -> None:
    stage = composed(f"experiment={experiment}").stage
    assert (stage.max_steps, stage.optim.warmup) == (180_000, 2_000)
    assert (stage.optim.lr, stage.optim.min_lr) == (5e-5, 5e-6)
    assert (list(stage.optim.betas), stage.optim.weight_decay) == ([0.9, 0.95], 0.1)
    assert list(stage.train_parts) == ["decoder", "projections"]
    assert stage.text_required


def test_finetuning_has_the_tutorials_schedule() -> None:
    stage = composed("experiment=paper_finetune").stage
    assert (stage.optim.lr, stage.optim.min_lr, stage.optim.warmup) == (2e-5, 0.0, 0.03)
    assert (stage.optim.weight_decay, stage.clip) == (0.0, 8.0)
    assert list(stage.train_parts) == ["decoder", "projections"]


# --- the size of a step


class Lengths:
    """Stands for a `Mixture`: samples of the lengths that the configuration's comments expect, drawn by its shares."""

    exhausted = False
    modalities = ("image", "text")

    def __init__(self, shares: tuple[float, float], pair: int, page: int) -> None:
        self.rng = random.Random(0)
        self.shares, self.pair, self.page = dict(zip(("pairs", "texts"), shares, strict=True)), pair, page
        self.drawn = {"pairs": 0, "texts": 0}
        self.streams: dict[str, Any] = {}

    def draw(self, modality: str | None = None) -> list[Sample]:
        total = sum(self.drawn.values()) + 1
        behind = max(self.shares, key=lambda name: self.shares[name] * total - self.drawn[name])
        kind = list(self.shares)[self.modalities.index(modality)] if modality else behind
        self.drawn[kind] += 1
        if kind == "pairs":
            return [Sample([0] * (self.pair + self.rng.randint(-8, 8)), [], (ImageRef("a"),), "pairs")]
        tokens = int(self.page * self.rng.lognormvariate(-0.5, 1.0)) + 1  # most pages are short, some are long
        return [Sample([0] * min(2048, tokens - start), [], (), "texts") for start in range(0, tokens, 2048)]


@pytest.mark.parametrize(
    ("experiment", "pairs", "caption"),
    [("paper_pretrain_real", "laion400m", 20), ("paper_pretrain_synthetic", "laion_coco", 12)],
)
def test_a_pretraining_step_holds_the_reported_batch(experiment: str, pairs: str, caption: int) -> None:
    ranks = 32
    cfg = composed(f"experiment={experiment}", f"trainer.devices={ranks}")
    rows = cfg.data.packing.micro_batch_rows * cfg.stage.accumulate * ranks
    assert rows == 512
    pair = 1 + SphinxConfig.from_dict(cfg.model).tokens_per_image + 61 + caption
    needed = 4096 * pair + 256 * 2048
    assert 0.95 < needed / (rows * cfg.data.packing.row_length) < 1
    # As one of 32 partitions packs it, which is a rank's part of a step.
    shares = cfg.data.sources[pairs].weight, cfg.data.sources.refinedweb.weight
    packing = build(PackingConfig, cfg.data.packing, "data.packing")
    partition = Partition(Lengths(shares, pair, page=594), packing)  # type: ignore[arg-type]
    steps = 160
    samples = [sample for _ in range(steps) for row in partition.plan(rows // ranks) for sample in row]
    images = sum(len(sample.images) for sample in samples) * ranks / steps
    text = sum(sample.length for sample in samples if not sample.images) * ranks / steps
    assert images == pytest.approx(4096, rel=0.06)
    assert text / 2048 == pytest.approx(256, rel=0.06)


def test_a_finetuning_step_has_room_for_the_tutorials_batch() -> None:
    cfg = composed("experiment=paper_finetune", "trainer.devices=16")
    rows = cfg.data.packing.micro_batch_rows * cfg.stage.accumulate * 16
    assert rows * cfg.data.packing.row_length == 128 * 512
    assert cfg.stage.max_steps * 128 == 1_600_000
    # A step has texts by their weight, so that the guarantee of one raises no share.
    assert 128 * cfg.data.sources.text.weight > 1


# --- files that are not there


@pytest.mark.parametrize("experiment", STAGES)
def test_each_missing_file_is_named_in_one_line(experiment: str, processor: Processor, tmp_path: Path) -> None:
    data = data_of(f"experiment={experiment}", f"data.root={tmp_path}")
    for section in ("sources", "val_sources"):
        given = data[section] if section == "val_sources" else leaves(data)
        for name, config in given.items():
            path = config["path"] if isinstance(config, dict) else config.path
            only: dict[str, Any] = {name.split(".")[0]: data[section][name.split(".")[0]]}
            if "." in name:
                group, member = name.split(".")
                only = {group: data[section][group] | {"sources": {member: data[section][group]["sources"][member]}}}
            sources = {
                "sources": only if section == "sources" else {},
                "val_sources": only if section != "sources" else {},
            }
            datamodule = DataModule(processor, sources["sources"], sources["val_sources"], data["packing"])
            with pytest.raises(UserError, match=re.escape(f"source '{name}': there is no file '{path}'")) as caught:
                datamodule.check()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("experiment", STAGES)
def test_the_plan_is_shown_without_the_data(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["table", f"experiment={experiment}", f"stage={STAGES[experiment]}", f"data.root={tmp_path}"]
    assert look(command) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert look([*command, "missing=ok"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in leaves(data_of(f"experiment={experiment}")))


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    cfg = composed("experiment=paper_finetune", f"data.root={tmp_path}")
    with pytest.raises(UserError, match=re.escape(f"no file at {tmp_path}/tokenizer.model")):
        Processor.from_dict(dict(cfg.data.processor), cfg.data.tokenizer, SphinxConfig.from_dict(cfg.model))


# --- from official files to batches

SIZE = (64, 48)
QA = {"question_id": 1, "image_id": 9, "question": "What is it?"}
ANSWERS = {"question_id": 1, "multiple_choice_answer": "cat", "answers": [{"answer": "cat"}]}
YES = {"question_id": 2, "image_id": 9, "question": "Is it red?"}
YES_ANSWERS = {"question_id": 2, "multiple_choice_answer": "yes", "answers": [{"answer": "yes"}]}
POINTS = [5, 5, 2] * 3 + [0, 0, 0] * 14


def coco(name: str, *annotations: dict[str, Any]) -> dict[str, Any]:
    things = [{"id": i, "image_id": 9, "iscrowd": 0} | thing for i, thing in enumerate(annotations, 1)]
    image = {"id": 9, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
    return {"images": [image], "annotations": things, "categories": [{"id": 1, "name": "person"}]}


def chat(image: str | None, *messages: str) -> dict[str, Any]:
    turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 9, messages, strict=False)]
    return {"id": "1", "conversations": turns} | ({"image": image} if image else {})


def refs(split: str) -> bytes:
    ref = {"ref_id": 1, "ann_id": 1, "image_id": 9, "split": split, "sentences": [{"sent": "the cat on the left"}]}
    return pickle.dumps([ref], 2)


BOX = {"category_id": 1, "bbox": [4, 4, 20, 30]}
TRAIN_2014, VAL_2014 = "COCO_train2014_000000000009.jpg", "COCO_val2014_000000000009.jpg"
REF_IMAGES = coco(TRAIN_2014, BOX)
PAGE = coco("9.png", BOX)
CAPTION = {"data": [{"image_id": "9", "caption_id": 1, "caption_str": "A sign that says stop."}]}
VG_BOX = {"x": 4, "y": 4, "width": 20, "height": 30}
VG_THING = {"x": 4, "y": 4, "w": 20, "h": 30}
OFFICIAL: dict[str, Any] = {
    **{
        f"vqav2/v2_{file}": content
        for split in ("train", "val")
        for file, content in (
            (f"OpenEnded_mscoco_{split}2014_questions.json", {"questions": [QA, YES]}),
            (f"mscoco_{split}2014_annotations.json", {"annotations": [ANSWERS, YES_ANSWERS]}),
        )
    },
    "okvqa/OpenEnded_mscoco_train2014_questions.json": {"questions": [QA]},
    "okvqa/mscoco_train2014_annotations.json": {"annotations": [ANSWERS]},
    "aokvqa/aokvqa_v1p0_train.json": [
        QA | {"choices": ["cat", "dog"], "correct_choice_idx": 1, "direct_answers": ["dog"], "rationales": []}
    ],
    "gqa/train_balanced_questions.json": {"1": {"imageId": "9", "question": "What is it?", "answer": "cat"}},
    "ocrvqa/dataset.json": {
        "9": {"imageURL": "a/b.jpg", "questions": ["Who wrote it?"], "answers": ["Ann"], "split": 1}
    },
    "vg/image_data.json": [{"image_id": 9, "url": "x/VG_100K_2/9.jpg", "width": SIZE[0], "height": SIZE[1]}],
    "vg/question_answers.json": [{"id": 9, "qas": [{"qa_id": 1, "question": "What is it?", "answer": "A cat."}]}],
    "vg/region_descriptions.json": [{"id": 9, "regions": [{"region_id": 1, "phrase": "a cat"} | VG_BOX]}],
    "vg/relationships.json": [
        {
            "image_id": 9,
            "relationships": [
                {
                    "relationship_id": 1,
                    "predicate": "ON",
                    "subject": {"name": "cat"} | VG_THING,
                    "object": {"name": "mat"} | VG_THING,
                }
            ],
        }
    ],
    "textcaps/TextCaps_0.1_train.json": CAPTION,
    "textcaps/TextCaps_0.1_val.json": CAPTION,
    "flickr30k_entities/train.txt": "9\n",
    "flickr30k_entities/UNRELATED_CAPTIONS": "",
    "flickr30k_entities/Sentences/9.txt": "[/EN#1/people A man] waits .\n",
    "flickr30k_entities/Annotations/9.xml": f"<annotation><size><width>{SIZE[0]}</width>"
    f"<height>{SIZE[1]}</height></size>"
    "<object><name>1</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>"
    "</annotation>",
    **{f"{name}/instances.json": REF_IMAGES for name in ("refcoco", "refcoco+", "refcocog")},
    "refcoco/refs(unc).p": pickle.dumps(pickle.loads(refs("train")) + pickle.loads(refs("val")), 2),
    "refcoco+/refs(unc).p": refs("train"),
    "refcocog/refs(umd).p": refs("train"),
    "coco/annotations/instances_train2017.json": coco("000000000009.jpg", BOX),
    "coco/annotations/person_keypoints_train2017.json": coco(
        "000000000009.jpg", BOX | {"keypoints": POINTS, "num_keypoints": 3}
    ),
    "coco/annotations/captions_train2017.json": coco("000000000009.jpg", {"caption": "A cat."}),
    "hiertext/gt/train.jsonl": json.dumps(
        {
            "annotations": [
                {
                    "image_id": "9",
                    "image_width": SIZE[0],
                    "image_height": SIZE[1],
                    "paragraphs": [
                        {
                            "lines": [
                                {"text": "STOP", "legible": True, "vertices": [[4, 4], [30, 4], [30, 12]], "words": []}
                            ]
                        }
                    ],
                }
            ]
        }
    ),
    "images/doclaynet/COCO/train.json": PAGE,
    "images/doclaynet/COCO/val.json": PAGE,
    "llava_instruct/llava_instruct_150k.json": [
        chat("000000000009.jpg", "What is it?", "A cat.", "And its colour?", "Red."),
        chat("000000000009.jpg", "Describe it.", "A red cat sits there."),
    ],
    "llavar/llava_instruct_150k_llavar_20k.json": [chat("100000000009.jpg", "What does it say?", "Stop.")],
    "sharegpt/ShareGPT_V3_unfiltered_cleaned_split.json": [chat(None, "Hello", "Good morning.")],
    "textvqa/TextVQA_0.5.1_train.json": {"data": [QA | {"image_id": "9", "answers": ["stop"]}]},
    "vizwiz/train.json": [{"image": "9.jpg", "question": "What?", "answers": [{"answer": "cup"}], "answerable": 1}],
    "scienceqa/problems.json": {
        "9": {"question": "Which?", "choices": ["a", "b"], "answer": 0, "image": "image.png", "split": "train"}
    },
    "images/iconqa/iconqa/train/choose_txt/9/data.json": {"question": "Which?", "choices": ["a", "b"], "answer": 1},
    "scienceqa/pid_splits.json": {"train": ["9"]},
    "vsr/splits/random/train.jsonl": json.dumps(
        {"image": "000000000009.jpg", "image_link": "x/train2017/9.jpg", "caption": "A cat.", "label": 1}
    ),
    "images/clevr/questions/CLEVR_train_questions.json": {
        "questions": [
            {
                "image_filename": "CLEVR_train_000009.png",
                "question": "What is left of it?",
                "answer": "cube",
                "program": [{"function": "relate"}],
            }
        ]
    },
}
IMAGES = [
    *(f"coco/{folder}/{name}" for folder, name in (("train2014", TRAIN_2014), ("val2014", VAL_2014))),
    "coco/train2017/000000000009.jpg",
    "gqa/images/9.jpg",
    "ocrvqa/images/9.jpg",
    "textvqa/train_images/9.jpg",
    "vg/VG_100K_2/9.jpg",
    "flickr30k/flickr30k-images/9.jpg",
    "hiertext/train/9.jpg",
    "doclaynet/PNG/9.png",
    "llavar/100000000009.jpg",
    "vizwiz/train/9.jpg",
    "scienceqa/train/9/image.png",
    "iconqa/iconqa/train/choose_txt/9/image.png",
    "clevr/images/train/CLEVR_train_000009.png",
]
COMMANDS = re.findall(r"^ *convert (\S+) (\S+) (\S+)$", DOC, re.MULTILINE)


@pytest.fixture(scope="module")
def paper_root(tmp_path_factory: pytest.TempPathFactory, sample_data: Path) -> Path:
    """Official files and images in the documented layout, and what the documented commands make of them."""
    root = tmp_path_factory.mktemp("paper")
    (root / "tokenizer.model").write_bytes((sample_data / "tokenizer.model").read_bytes())
    for place in IMAGES:
        path = root / "images" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, "red").save(path)
    for place, content in OFFICIAL.items():
        path = root / (place if place.startswith("images/") else f"annotations/{place}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    for name, folder, split in COMMANDS:
        out = root / "instructions" / f"{name}-{split}.jsonl"
        assert convert([name, "--src", str(root / folder), "--out", str(out), "--split", split]) == 0
    return root


@pytest.fixture
def long_processor(paper_root: Path, processor: Processor) -> Processor:
    """With room for 17 keypoints in pieces of a few letters."""
    config = ProcessorConfig(system="", decimals=2, max_length=900)
    return Processor(
        config, load_tokenizer(paper_root / "tokenizer.model"), processor.tokens_per_image, processor.image_size
    )


def loader(data: dict[str, Any], processor: Processor) -> TrainLoader:
    keys = ("sources", "val_sources", "mixing", "augment", "max_skipped")
    packing = data["packing"] | {"row_length": 900, "micro_batch_rows": 4}
    datamodule = DataModule(processor, packing=packing, **{key: data[key] for key in keys})
    datamodule.check(text_required=True)
    for name, batches in datamodule.val_loaders().items():
        assert sum(batch.counters["samples"] for batch in batches) > 0, name
    return TrainLoader(datamodule.planner(partitions=1), datamodule.collator, 0, datamodule.max_skipped, False)


@pytest.mark.parametrize(
    ("overrides", "lacking"),
    [
        (("experiment=paper_finetune",), {"relation"}),  # which only CLEVR has
        (MORE, set()),
    ],
)
def test_official_files_become_batches_with_every_task(
    paper_root: Path, long_processor: Processor, overrides: tuple[str, ...], lacking: set[str]
) -> None:
    data = data_of(*overrides, f"data.root={paper_root}")
    expected = {task for converter in CONVERTERS.values() for task in converter.tasks} - lacking
    train = loader(data, long_processor)
    names: set[str] = set()
    sources: set[str] = set()
    for batch in itertools.islice(train, 40):
        names |= {batch.tasks[int(i)] for i in set(batch.task_ids[batch.labels != IGNORE].tolist())}
        sources |= {key.split("/", 1)[0] for key in batch.keys}
    assert names == expected
    assert sources == set(leaves(data))
    assert not train.skipped  # so every image was where the layout says
    assert look(["table", *overrides, f"data.root={paper_root}", "probe=2", "ranks=16"]) == 0


@pytest.mark.parametrize("experiment", ["paper_pretrain_real", "paper_pretrain_synthetic"])
def test_shards_and_tables_become_batches_with_pairs_and_text(
    tmp_path: Path, sample_data: Path, long_processor: Processor, experiment: str
) -> None:
    image = io.BytesIO()
    Image.new("RGB", (80, 80), "red").save(image, "JPEG")
    columns = {"similarity": 0.33, "NSFW": "UNLIKELY", "punsafe": 0.1, "pwatermark": 0.1, "width": 80, "height": 80}
    unwanted: list[dict[str, Any]] = [{"NSFW": "NSFW", "punsafe": 0.9}, {"similarity": None, "pwatermark": None}]
    for folder, part in itertools.product(("laion400m", "laion_coco"), ("train", "val")):
        path = tmp_path / folder / part / "00000.tar"
        path.parent.mkdir(parents=True)
        with tarfile.open(path, "w") as tar:
            for i, change in enumerate([{}, {}, {}, *unwanted]):
                meta = json.dumps(columns | change | {"caption": f"a red square, number {i}"}).encode()
                text = f"a red square, number {i}".encode()
                for end, content in (("jpg", image.getvalue()), ("json", meta), ("txt", text)):
                    info = tarfile.TarInfo(f"{i:05d}.{end}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    for part in ("train", "val"):
        path = tmp_path / "refinedweb" / part / "0.parquet"
        path.parent.mkdir(parents=True)
        pages = [f"A page of text with the number {i}." for i in range(9)]
        pyarrow.parquet.write_table(pyarrow.table({"content": pages, "url": pages}), path)

    data = data_of(f"experiment={experiment}", f"data.root={tmp_path}")
    train = loader(data, long_processor)
    batches = list(itertools.islice(train, 3))
    assert all(batch.counters["modality/image"] and batch.counters["modality/text"] for batch in batches)
    pairs = "laion400m" if experiment == "paper_pretrain_real" else "laion_coco"
    assert {key.split("/", 1)[0] for batch in batches for key in batch.keys} == {pairs, "refinedweb"}
    reasons = {key.removeprefix(f"{pairs}/filtered/") for key in train.counters if "/filtered/" in key}
    assert reasons == ({"NSFW", "similarity_absent"} if pairs == "laion400m" else {"punsafe", "pwatermark_absent"})
    assert not train.skipped


# --- the documentation


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of each line of the table below a heading."""
    section = DOC.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_documentation_has_every_converter() -> None:
    table = {cells[0].strip("`"): cells for cells in rows("The data sets")}
    assert set(table) == set(CONVERTERS)
    for name, converter in CONVERTERS.items():
        cells = table[name]
        assert converter.title in cells[1]
        assert converter.url in cells[1]
        assert cells[2].startswith(converter.licence.split(",")[0].split(";")[0].split(" (")[0])
        assert cells[3].strip("`").removeprefix("convert ").split(" ") in [list(command) for command in COMMANDS]
        assert cells[5] == ", ".join(converter.splits)
        assert cells[6] == ", ".join(converter.tasks)
    assert {name for name, _, split in COMMANDS if split == CONVERTERS[name].splits[0]} == set(CONVERTERS)


def test_the_documentation_has_every_task_as_it_is_written() -> None:
    table = {cells[0].strip("`"): cells for cells in rows("Tasks")}
    assert set(table) == set(TASKS)
    for name, task in TASKS.items():
        turn = task.turns(EXAMPLES[name], Coordinates(3))[0]
        question, answer = (
            f"`{text.strip()}`".replace("\n", "⏎") if text.strip() else "(none)"
            for text in (turn.question, turn.answer)
        )
        assert table[name][2:] == [question, answer, task.scorer], name


def test_the_documentation_names_every_folder_of_the_layout() -> None:
    for place in IMAGES:
        assert place.split("/")[0] + "/" in DOC
    for name, config in leaves(data_of(*MORE)).items():
        root = str(config.options.get("root", ""))
        assert not root or f"{Path(root).name}/" in DOC, name


def test_the_example_of_a_mixture_is_one() -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    sources = yaml.safe_load(text.split("```yaml\n", 1)[1].split("```", 1)[0])["sources"]
    assert sources["tasks"]["sources"].pop("old")["kind"] == META  # whose file is read at once
    group = Group.from_dict({"sources": sources})
    assert set(dict(group.leaves())) == {"real", "text", "tasks.vqa"}
