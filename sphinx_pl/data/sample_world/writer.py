"""The sample world is written to disk in the formats of the real data sets.

    real/, synthetic/       WebDataset shards as img2dataset writes them: KEY.jpg, KEY.json, KEY.txt
    text/*.jsonl            {"text": ...} a line
    instructions/*.json     LLaVA-style lists, with images/ beside them. `image` is relative to the
                            json's folder. Training has a file for each kind of picture
                            (train-scenes, -ocr, -pose, -layout, -chat)
    origins.jsonl           the split, photograph, crop and scans that each picture is made from
    tokenizer.model         a tokenizer that is trained on the training texts
    manifest.json           seed, version, counts and the SHA-256 of every file; it is written last

The same seed and scale give the same bytes with the same library versions.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinx_pl.data.generated import MANIFEST, SHARD_SIZE, GeneratedFolder, generate, json_file, pair_files, tar
from sphinx_pl.data.readers import InstructionReader
from sphinx_pl.data.sample_world import figures, language, records
from sphinx_pl.data.sample_world.assets import Assets, load_assets
from sphinx_pl.data.sample_world.drawing import DOMAINS, REAL
from sphinx_pl.data.sample_world.records import JsonEntry
from sphinx_pl.data.sample_world.scenes import MAX_OBJECTS, DrawnPicture, Scene, draw_scene
from sphinx_pl.data.sample_world.vocabulary import train_tokenizer

__all__ = ["MANIFEST", "build"]

VERSION = 5
"""The version rises when the world changes. Data of an older version is then replaced."""

# The numbers of items at scale 1. They are per domain where items have domains.
PAIRS = {"train": 3000, "val": 256}
DOCUMENTS = {"train": 4000, "val": 256}
SCENES = {"train": 2000, "val": 50}
CONVERSATIONS = {"train": 200, "val": 10}
FIGURES = {
    "ocr": {"train": 1000, "val": 20, "test": 100},
    "pose": {"train": 400, "val": 20, "test": 100},
    "layout": {"train": 400, "val": 20, "test": 100},
}
TEST_QUESTIONS = {
    ("short_vqa", "color"): 100,
    ("short_vqa", "shape"): 100,
    ("short_vqa", "digit"): 100,
    ("short_vqa", "count"): 100,
    ("multiple_choice", "object"): 50,
    ("multiple_choice", "color"): 50,
    ("rec", ""): 100,
    ("reg", ""): 100,
    ("grounded_caption", ""): 100,
    ("detection", ""): 100,
    ("description", ""): 100,
    ("relation", ""): 100,
}


@dataclass
class _World(GeneratedFolder):
    """The world that is being written, with the origin of every picture."""

    origins: list[str] = field(default_factory=list)

    def note(self, place: str, split: str, picture: DrawnPicture) -> None:
        origin = {"image": place, "split": split, "domain": picture.domain, **picture.origin.to_dict()}
        self.origins.append(json.dumps(origin, sort_keys=True))


def build(out: str | Path, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Make the sample data in the folder `out` and return its manifest.

    Nothing is made if the same data is already there and whole.

    Args:
        seed: the seed of everything drawn. The split of scans and photographs does not depend on it.
        scale: the factor on the number of items of every kind.

    Raises:
        UserError: `out` exists and holds something else.
    """
    identity = {"version": VERSION, "seed": seed, "scale": scale}
    return generate(out, identity, lambda root: _fill(_World(root, seed, scale)), "sample data")


def _fill(world: _World) -> dict[str, int]:
    texts: list[str] = []
    for domain in DOMAINS:
        for split in ("train", "val"):
            captions = _write_pairs(world, domain, split)
            texts += captions if split == "train" else []
    texts += _write_documents(world)
    _write_instructions(world)
    instructions = InstructionReader("sample", str(world.root / "instructions/train-*.json"))
    world.write("tokenizer.model", train_tokenizer(texts, instructions))
    world.write("origins.jsonl", "".join(f"{line}\n" for line in world.origins))
    return world.counts


def _assets(domain: str, split: str) -> Assets | None:
    return load_assets(split == "train") if domain == REAL else None


def _write_pairs(world: _World, domain: str, split: str) -> list[str]:
    """Write shards of captioned scenes and return the captions."""
    captions: list[str] = []
    total = world.number(PAIRS[split])
    for shard, first in enumerate(range(0, total, SHARD_SIZE)):
        name = f"{domain}/{split}-{shard:05d}.tar"
        members: list[tuple[str, bytes]] = []
        for index in range(first, min(first + SHARD_SIZE, total)):
            rng = world.rng("pairs", domain, split, index)
            scene = draw_scene(rng, domain, _assets(domain, split), index % MAX_OBJECTS + 1)
            if domain == REAL:
                caption, noise = language.real_caption(scene, rng)
            else:
                caption, noise = language.synthetic_caption(scene, rng), "none"
            captions.append(caption)
            key = f"{shard:05d}{index - first:04d}"
            world.note(f"{name}/{key}.jpg", split, scene)
            world.counts[f"pairs/{domain}/{split}"] += 1
            url = f"sample://{domain}/{key}"
            # The fault of the caption (none, partial, wrong), and what the picture shows.
            columns = {"noise": noise, "objects": [thing.phrase for thing in scene.things]}
            members += pair_files(key, scene.jpeg, (scene.width, scene.height), caption, url, columns)
        world.write(name, tar(members))
    return captions


def _write_documents(world: _World) -> list[str]:
    """Write text/*.jsonl and return the training documents.

    No validation document is a training document.
    """
    all_facts = language.facts()
    distinct: set[str] = set()
    by_split: dict[str, list[str]] = {}
    for split in ("val", "train"):
        rng = world.rng("text", split)
        documents: list[str] = []
        while len(documents) < world.number(DOCUMENTS[split]):
            text = language.document(rng, all_facts)
            if text not in distinct:
                distinct.add(text)
                documents.append(text)
        by_split[split] = documents
        world.counts[f"text/{split}"] = len(documents)
        world.write(f"text/{split}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in documents))
    return by_split["train"]


def _write_instructions(world: _World) -> None:
    """Write instructions/*.json and their images."""
    chats = dict(zip(("train", "val", "test"), language.split_facts(world.rng("facts")), strict=True))
    for split, group in chats.items():
        writer = _Instructions(world, split)
        for domain in DOMAINS:
            if split == "test":
                writer.questions(domain)
            else:
                writer.scenes(domain)
            for task in FIGURES:
                writer.figures(domain, task)
        for index, fact in enumerate(group):
            writer.add(f"{split}-chat-{index:05d}", records.chat_entry(fact))
        for name, entries in writer.files().items():
            world.write(f"instructions/{name}.json", json_file(entries))


@dataclass
class _Instructions:
    """The entries of one split."""

    world: _World
    split: str
    entries: list[JsonEntry] = field(default_factory=list)

    def add(self, name: str, entry: JsonEntry, picture: DrawnPicture | None = None) -> None:
        """Add the entry, completed with its id, its image and its domain."""
        if picture is not None:
            entry |= {"image": f"images/{name}.jpg", "width": picture.width, "height": picture.height}
            entry["meta"] = {**entry.get("meta", {}), "domain": picture.domain}
        self.entries.append({"id": f"{name}-{len(self.entries):06d}", **entry})
        task = entry.get("task", "conversations")
        self.world.counts[f"instructions/{self.split}/{entry['meta']['domain']}/{task}"] += 1

    def files(self) -> dict[str, list[JsonEntry]]:
        """Return the entries of each file.

        Training has a file for each kind of picture, so that a mixture can weigh them. Other splits
        have one file.
        """
        if self.split != "train":
            return {self.split: self.entries}
        kinds: dict[str, list[JsonEntry]] = {}
        for entry in self.entries:
            figure = entry.get("task") if entry.get("task") in FIGURES else "scenes"
            kinds.setdefault(f"train-{figure if 'image' in entry else 'chat'}", []).append(entry)
        return kinds

    def save(self, name: str, picture: DrawnPicture) -> None:
        self.world.write(f"instructions/images/{name}.jpg", picture.jpeg)
        self.world.note(f"instructions/images/{name}.jpg", self.split, picture)
        self.world.counts[f"images/{self.split}/{picture.domain}"] += 1

    def scenes(self, domain: str) -> None:
        """Add every kind of question about each scene.

        Some scenes also have a conversation, at even distances.
        """
        total = self.world.number(SCENES[self.split])
        every = total // min(total, self.world.number(CONVERSATIONS[self.split]))
        for index in range(total):
            rng = self.world.rng("scene", domain, self.split, index)
            scene = draw_scene(rng, domain, _assets(domain, self.split), index % MAX_OBJECTS + 1)
            name = f"{self.split}-{domain}-{index:05d}"
            self.save(name, scene)
            entries = records.scene_entries(scene, rng)
            if index % every == 0:
                entries.append(records.conversation_entry(scene, rng))
            for entry in entries:
                self.add(name, entry, scene)

    def figures(self, domain: str, task: str) -> None:
        """Add pictures of one kind.

        A pose picture with two people gives two entries. The test asks for one of them only.
        """
        for index in range(self.world.number(FIGURES[task][self.split])):
            rng = self.world.rng(task, domain, self.split, index)
            assets = _assets(domain, self.split)
            if task == "pose":
                figure = figures.draw_people(rng, domain, assets, index % 2 + 1)
            else:
                figure = (figures.draw_numbers if task == "ocr" else figures.draw_page)(rng, domain, assets)
            name = f"{self.split}-{domain}-{task}-{index:05d}"
            self.save(name, figure)
            entries = records.figure_entries(figure, task)
            for entry in [rng.choice(entries)] if self.split == "test" else entries:
                self.add(name, entry, figure)

    def questions(self, domain: str) -> None:
        """Add the test, which has one question about each fresh scene."""
        assets = _assets(domain, self.split)
        for (task, topic), at_full_scale in TEST_QUESTIONS.items():
            for index in range(self.world.number(at_full_scale)):
                rng = self.world.rng("test", domain, task, topic, index)

                def draw(count: int, wanted: Any = None, rng: random.Random = rng) -> Scene:
                    return draw_scene(rng, domain, assets, count, wanted)

                scene, entry = records.held_out_entry(task, topic, index, draw, rng)
                name = f"{self.split}-{domain}-{task}{'-' * bool(topic)}{topic}-{index:05d}"
                self.save(name, scene)
                self.add(name, entry, scene)
