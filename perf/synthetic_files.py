"""Data for the benchmarks of loading and packing: words, photographs and the files that hold them."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from bisect import bisect
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import sentencepiece as spm
from PIL import Image

VOCAB_SIZE = 16_000
SIZES = ((640, 480), (480, 640), (512, 384), (640, 427))
"""Width and height as in COCO: three of four are wider than high."""


class Words:
    """Text of made-up words, as frequent as Zipf's law has it: a tokenizer finds common words, parts and rare ones."""

    def __init__(self, seed: int = 0, count: int = 40_000) -> None:
        rng = random.Random(seed)
        starts = (*"bcdfghlmnprstvw", "st", "tr", "ch", "br", "pl")
        syllables = [start + end for start in starts for end in (*"aeiou", "ea", "ai", "on", "er", "ing")]
        words = {"".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 3, 4)))): None for _ in range(count)}
        self.words = list(words)
        self._ends = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(self.words))))

    def text(self, rng: random.Random, count: int) -> str:
        """`count` words in sentences."""
        drawn = [self.words[bisect(self._ends, rng.random() * self._ends[-1])] for _ in range(count)]
        sentences = (drawn[at : at + 14] for at in range(0, count, 14))
        return " ".join(" ".join(sentence).capitalize() + "." for sentence in sentences)


def train_tokenizer(words: Words, path: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A sentencepiece model with LLaMA's settings (BPE, byte fallback, no normalization) and half of its vocabulary."""
    rng = random.Random(1)
    model = io.BytesIO()
    spm.SentencePieceTrainer.Train(
        sentence_iterator=(words.text(rng, 50) for _ in range(6000)),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG that costs about what a photograph does: soft colours, straight edges, and a texture."""

    def noise(grid: tuple[int, int], low: int, high: int) -> np.ndarray:
        coarse = Image.fromarray(rng.integers(low, high, (*grid, 3), dtype=np.uint8))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)

    pixels = noise((6, 8), 0, 256) + noise((max(1, height // 4), max(1, width // 4)), 96, 160) - 128
    x, y = np.linspace(-0.5, 0.5, width)[None, :, None], np.linspace(-0.5, 0.5, height)[:, None, None]
    for _ in range(6):
        across, down, where = rng.normal(size=3)
        pixels += (across * x + down * y > where * 0.3) * rng.integers(-40, 40, 3, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """(key, contents by extension) as a shard. Times are fractions, as img2dataset's: every member has a PAX header."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(data), 1_700_000_000.25
                tar.addfile(info, io.BytesIO(data))
    return path


def write_lines(path: Path, entries: Iterable[Mapping[str, object]], as_list: bool = False) -> Path:
    """Objects as jsonl, or as a JSON list with an entry a line."""
    with path.open("w") as file:
        file.write("[\n" if as_list else "")
        for number, entry in enumerate(entries):
            file.write((",\n" if number and as_list else "") + json.dumps(entry) + ("" if as_list else "\n"))
        file.write("\n]\n" if as_list else "")
    return path
