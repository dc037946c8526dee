"""What loading data costs: speed per core beside two yardsticks, start-up on large indices, memory over many samples.

    python -m perf.data                    # all three
    python -m perf.data speed --rounds 9
    python -m perf.data startup --lines 1000000
    python -m perf.data memory --samples 20000

It makes its own data in a temporary folder and runs what training runs: a planner, its micro-batches, the collator.
Speed is samples a second of processor time on one core, everything in one process (in training, planning and each data
worker have a core of their own); the contenders take turns, and ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from perf.harness import console, parser, ratios, run_command, spread, status, table, turns
from perf.synthetic_files import SIZES, Words, photograph, train_tokenizer, write_lines, write_tar
from sphinx_pl.data import readers
from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.images import PAD_COLOUR
from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.prompt_formats import SPHINX
from sphinx_pl.data.readers.base import Shard
from sphinx_pl.data.schema import IMAGE_SLOT, Turn
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.data.train_loader import TrainLoader
from sphinx_pl.utils.errors import UserError

IMAGE_SIZE, IMAGE_TOKENS, ROW_LENGTH, ROWS = 224, 291, 2048, 4
"""Those of sphinx_7b: one view of 224 pixels, 289 visual tokens with a start and an end."""


def make_datamodule(
    source: dict[str, Any] | Sequence[dict[str, Any]], tokenizer_file: Path, rows: int = ROWS, workers: int = 0
) -> DataModule:
    """The data of one source, or of several with equal weights, with the geometry of sphinx_7b."""
    mixture = [source] if isinstance(source, dict) else source
    processor = Processor(ProcessorConfig(), load_tokenizer(tokenizer_file), IMAGE_TOKENS, IMAGE_SIZE)
    settings = {"row_length": ROW_LENGTH, "micro_batch_rows": rows}
    return DataModule(processor, {f"{one['kind']}{n}": one for n, one in enumerate(mixture)}, {}, settings, workers)


# -- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """A kind of source: what the project reads, and the same for the yardsticks."""

    name: str
    source: dict[str, Any]
    photographs: list[Path]
    """A file for each of its images; empty: text only."""
    texts: list[str]
    shards: list[Path]
    """The same samples as WebDataset has them."""


def conversation(words: Words, rng: random.Random, turns: int, answer: int) -> list[dict[str, str]]:
    """LLaVA's form: `turns` questions of about 10 words, answers of about `answer`."""
    lengths = ((rng.randint(6, 14), max(1, round(answer * rng.uniform(0.5, 1.5)))) for _ in range(turns))
    return [
        {"from": speaker, "value": words.text(rng, count)}
        for pair in lengths
        for speaker, count in zip(("human", "gpt"), pair, strict=True)
    ]


def make_kinds(folder: Path, count: int) -> tuple[list[Kind], Path]:
    """Every kind of source with `count` images or documents, and a tokenizer."""
    words, rng, pixels = Words(), random.Random(0), np.random.default_rng(0)
    tokenizer_file = train_tokenizer(words, folder / "tokenizer.model")
    photographs = [photograph(pixels, *SIZES[number % len(SIZES)]) for number in range(count)]
    paths = []
    (folder / "images").mkdir()
    for number, data in enumerate(photographs):
        paths.append(folder / "images" / f"{number:06d}.jpg")
        paths[-1].write_bytes(data)
    per_shard = max(1, count // 4)

    def tars(name: str, samples: Sequence[dict[str, bytes]]) -> list[Path]:
        size = per_shard * max(1, len(samples) // count)
        keyed = [(f"{number:09d}", sample) for number, sample in enumerate(samples)]
        return [
            write_tar(folder / f"{name}-{start // size:05d}.tar", keyed[start : start + size])
            for start in range(0, len(keyed), size)
        ]

    captions = [words.text(rng, rng.randint(6, 20)) for _ in paths]
    columns = [
        {"caption": caption, "url": f"https://example.org/{number}.jpg", "key": f"{number:09d}", "status": "success"}
        | {"width": 640, "height": 480, "similarity": round(rng.uniform(0.2, 0.4), 4), "sha256": f"{number:064x}"}
        for number, caption in enumerate(captions)
    ]
    pairs = tars(
        "pairs",
        [
            {"jpg": photo, "json": json.dumps(column).encode(), "txt": caption.encode()}
            for photo, column, caption in zip(photographs, columns, captions, strict=True)
        ],
    )
    kinds = [
        # Two shards at a time, so that opening shards is part of it as in training.
        Kind(
            "pairs (tar)", {"kind": "image_text", "path": list(map(str, pairs)), "shuffle_shards": 2}, paths, [], pairs
        )
    ]
    for name, as_list, questions, exchanges, answer in (
        ("chats (jsonl)", False, 1, 3, 40),
        ("questions (json list)", True, 1, 1, 2),
        ("4 questions an image (jsonl)", False, 4, 1, 2),
    ):
        entries: list[dict[str, Any]] = [
            {
                "id": f"{number}-{question}",
                "image": f"images/{path.name}",
                "conversations": conversation(words, rng, exchanges, answer),
            }
            for number, path in enumerate(paths)
            for question in range(questions)
        ]
        stem = f"instructions{len(kinds)}"
        file = write_lines(folder / f"{stem}.{'json' if as_list else 'jsonl'}", entries, as_list)
        source = {"kind": "instructions", "path": str(file), "questions_per_sample": questions}
        shards = tars(
            stem,
            [
                {"jpg": photographs[number // questions], "json": json.dumps(entry).encode()}
                for number, entry in enumerate(entries)
            ],
        )
        kinds.append(Kind(name, source, paths, [], shards))
    documents = [words.text(rng, rng.randint(100, 1200)) for _ in range(count)]
    shards = tars("documents", [{"txt": document.encode()} for document in documents])
    lines = write_lines(folder / "documents.jsonl", ({"text": document} for document in documents))
    kinds.append(Kind("text (jsonl)", {"kind": "text", "path": str(lines)}, [], documents, shards))
    import pyarrow
    import pyarrow.parquet

    table = folder / "documents.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), table)
    kinds.append(Kind("text (parquet)", {"kind": "text", "path": str(table)}, [], documents, shards))
    return kinds, tokenizer_file


# -- speed -----------------------------------------------------------------------------------------------------------

Done = tuple[int, int]
"""Samples and images of a piece of work."""


def ours(kind: Kind, tokenizer_file: Path) -> Iterator[Done]:
    """Micro-batches as training gets them."""
    datamodule = make_datamodule(kind.source, tokenizer_file)
    planner = datamodule.planner()
    for plan in planner:
        batch = datamodule.collator(plan.rows)
        planner.consumed(plan.step)
        yield int(batch.counters["samples"]), int(batch.counters["images"])


def plain_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)


def bare(kind: Kind, tokenizer_file: Path) -> Iterator[Done]:
    """Pillow alone: open, RGB, pad, resize, to an array. Of text the tokenizer alone."""
    if not kind.photographs:
        encoder = load_tokenizer(tokenizer_file)
        for text in itertools.cycle(kind.texts):
            encoder.encode(text)
            yield 1, 0
    for path in itertools.cycle(kind.photographs):
        np.asarray(plain_square(Image.open(path).convert("RGB")))
        yield 1, 1


def plain_webdataset(kind: Kind, tokenizer_file: Path, batch_size: int = 24) -> Iterator[Done]:
    """The pipeline of WebDataset's manual: shuffle, decode, map, batch; the same transforms and tokenizer, padding."""
    import webdataset
    from torchvision.transforms.functional import pil_to_tensor

    encoder = load_tokenizer(tokenizer_file)
    system = ProcessorConfig().system

    def prepare(sample: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        if "json" in sample and "conversations" in sample["json"]:
            values = [message["value"] for message in sample["json"]["conversations"]]
            turns = [Turn(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
            text = SPHINX.render(turns, system).text
        else:
            text = sample["txt"]
        slots = [IMAGE_SLOT] * IMAGE_TOKENS if "jpg" in sample else []
        ids = torch.tensor([encoder.bos_id, *slots, *encoder.encode(text)][:ROW_LENGTH])
        return pil_to_tensor(plain_square(sample["jpg"])) if "jpg" in sample else None, ids

    def collate(samples: list[tuple[torch.Tensor | None, torch.Tensor]]) -> Done:
        pixels = [image for image, _ in samples if image is not None]
        ids = torch.nn.utils.rnn.pad_sequence([ids for _, ids in samples], batch_first=True)
        labels = ids.masked_fill(ids <= 0, -100)
        if pixels:
            torch.stack(pixels)
        return len(labels), len(pixels)

    pipeline = (
        webdataset.WebDataset(list(map(str, kind.shards)), shardshuffle=False)
        .shuffle(100)
        .decode("pilrgb")
        .map(prepare)
        .batched(batch_size, collation_fn=collate)
        .repeat()
    )
    yield from pipeline


CONTENDERS = {"ours": ours, "bare": bare, "webdataset": plain_webdataset}


@dataclass
class Rate:
    """Samples and images a second of processor time, of all threads together."""

    samples: float
    images: float


def rate(work: Iterator[Done], seconds: float) -> Rate:
    """The rate over at least `seconds` seconds of work."""
    start = time.process_time()
    samples = pictures = 0
    while (took := time.process_time() - start) < seconds:
        done = next(work)
        samples, pictures = samples + done[0], pictures + done[1]
    return Rate(samples / took, pictures / took)


def compare(kind: Kind, tokenizer_file: Path, rounds: int, seconds: float) -> list[str]:
    """A row of the table: all contenders in turns, ratios above 1 where ours is the faster."""
    works = {name: work(kind, tokenizer_file) for name, work in CONTENDERS.items()}
    for work in works.values():  # opens files, fills caches and the planner's look-ahead
        rate(work, seconds / 2)
    rates = turns({name: partial(rate, work, seconds) for name, work in works.items()}, rounds)
    unit = "images" if kind.photographs else "samples"

    def of(name: str, unit: str) -> list[float]:
        return [getattr(one, unit) for one in rates[name]]

    medians = [statistics.median(of("ours", key)) for key in ("samples", "images")]
    medians += [statistics.median(of("bare", unit)), statistics.median(of("webdataset", "samples"))]
    against = (ratios(of("ours", unit), of("bare", unit)), ratios(of("ours", "samples"), of("webdataset", "samples")))
    return [kind.name, *(f"{number:,.0f}" for number in medians), *map(spread, against)]


def speed(folder: Path, options: argparse.Namespace) -> Table:
    """Samples a second of processor time on one core."""
    kinds, tokenizer_file = make_kinds(folder, options.images)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        rows = [compare(kind, tokenizer_file, options.rounds, options.seconds) for kind in kinds]
    finally:
        os.sched_setaffinity(0, cores)
    size = statistics.mean(path.stat().st_size for path in kinds[0].photographs)
    title = f"Loading: a second of processor time; {options.images} photographs of {size / 1000:.0f} kB"
    columns = ("source", "samples", "images", "bare", "webdataset", "to bare", "to webdataset")
    return table(title, columns, rows, "bare: Pillow alone, of text the tokenizer alone")


# -- start-up --------------------------------------------------------------------------------------------------------


@dataclass
class Start:
    """From nothing to the first micro-batch, in a process of its own."""

    seconds: float
    peak: float
    """MB above what the process had before, mapped files included."""
    shards: int
    """How many were opened."""


def start(source: dict[str, Any], tokenizer_file: Path) -> Start:
    opened = []

    def counted(open_shard: Callable[..., Shard]) -> Callable[..., Shard]:
        return lambda self, number: opened.append(number) or open_shard(self, number)

    with contextlib.ExitStack() as patches:
        for kind in readers.READERS.values():
            patches.enter_context(patch.object(kind, "open", counted(kind.open)))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, begin = status("VmHWM"), time.perf_counter()
        datamodule = make_datamodule(source, tokenizer_file)
        for plan in itertools.islice(datamodule.planner(), 1):
            datamodule.collator(plan.rows)
        return Start(time.perf_counter() - begin, status("VmHWM") - before, len(opened))


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def write_many(path: Path, count: int, as_list: bool) -> Path:
    """`count` entries about a few images, in no time: a block of them again and again."""
    words, rng = Words(), random.Random(0)
    block = [
        json.dumps({"id": f"{n:09d}", "image": f"images/{n % 8}.jpg", "conversations": conversation(words, rng, 1, 12)})
        for n in range(1000)
    ]
    between = ",\n" if as_list else "\n"
    with path.open("w") as file:
        file.write("[\n" if as_list else "")
        for at in range(0, count, len(block)):
            last = at + len(block) >= count
            file.write(between.join(block[: count - at]) + ("" if last else between))
        file.write("\n]\n" if as_list else "\n")
    return path


@dataclass
class Case:
    """A start to be measured, and a second one with what it left in the cache."""

    name: str
    megabytes: float
    source: dict[str, Any]


def make_cases(folder: Path, shards: int, per_shard: int, lines: int) -> tuple[list[Case], Path]:
    words, rng = Words(), random.Random(0)
    tokenizer_file = train_tokenizer(words, folder / "tokenizer.model")
    small = photograph(np.random.default_rng(0), 96, 72)
    (folder / "images").mkdir()
    for number in range(8):
        (folder / "images" / f"{number}.jpg").write_bytes(small)
    (folder / "pairs").mkdir()
    caption = words.text(rng, 12)
    files_ = {"jpg": small, "json": json.dumps({"caption": caption}).encode(), "txt": caption.encode()}
    first = write_tar(folder / "pairs" / "00000.tar", ((f"{number:09d}", files_) for number in range(per_shard)))
    for number in range(1, shards):  # of one content, but files of their own to whoever opens them
        (folder / "pairs" / f"{number:05d}.tar").hardlink_to(first)
    pairs = {"kind": "image_text", "path": str(folder / "pairs" / "*.tar")}
    cases = [Case(f"{shards:,} tars of {per_shard:,} pairs", first.stat().st_size * shards / 1e6, pairs)]
    for name, as_list in (("json", True), ("jsonl", False)):
        path = write_many(folder / f"many.{name}", lines, as_list)
        source = {"kind": "instructions", "path": str(path)}
        cases.append(Case(f"{lines:,} lines of {name}", path.stat().st_size / 1e6, source))
    joined = {"questions_per_sample": 4}
    cases.append(Case("the same, questions_per_sample: 4", cases[-1].megabytes, cases[-1].source | joined))
    return cases, tokenizer_file


def startup(folder: Path, options: argparse.Namespace) -> Table:
    """Seconds and memory of the first micro-batch, for the first time and with what that left in the cache."""
    cases, tokenizer_file = make_cases(folder, options.shards, options.pairs, options.lines)
    rows = []
    for case in cases:
        first, second = (in_new_process(start, case.source, tokenizer_file) for _ in range(2))
        numbers = (f"{first.seconds:.2f}", f"{first.peak:,.0f}", f"{second.seconds:.2f}", f"{second.peak:,.0f}")
        rows.append([case.name, f"{case.megabytes:,.0f}", str(first.shards), *numbers])
    columns = ("source", "MB", "shards opened", "first time, s", "peak, MB", "again, s", "peak, MB")
    return table("From nothing to the first micro-batch", columns, rows)


# -- memory ----------------------------------------------------------------------------------------------------------


@dataclass
class Held:
    """Resident MB after each number of samples."""

    samples: int
    worker: float
    planning: float


def memory_over(folder: Path, marks: Sequence[int]) -> Iterator[Held]:
    """Resident memory of a data worker and of the process that plans, at each of `marks` samples."""
    words, rng = Words(), random.Random(0)
    tokenizer_file = train_tokenizer(words, folder / "tokenizer.model")
    pixels = np.random.default_rng(0)
    small = [photograph(pixels, *size) for size in ((96, 72), (72, 96), (64, 64), (100, 80))]
    (folder / "images").mkdir()
    for number, data in enumerate(small):
        (folder / "images" / f"{number}.jpg").write_bytes(data)
    captions = [words.text(rng, rng.randint(6, 20)) for _ in range(1000)]
    for shard in range(20):
        files_ = (
            (f"{shard}-{n:04d}", {"jpg": small[n % 4], "txt": caption.encode()}) for n, caption in enumerate(captions)
        )
        write_tar(folder / f"pairs-{shard:05d}.tar", files_)
    entries = (
        {"image": f"images/{n % 4}.jpg", "conversations": conversation(words, rng, 2, 10)} for n in range(10_000)
    )
    chats = write_lines(folder / "chats.jsonl", entries)
    documents = write_lines(folder / "text.jsonl", ({"text": words.text(rng, 200)} for _ in range(5000)))
    mixture = [
        {"kind": "image_text", "path": str(folder / "pairs-*.tar"), "weight": 6},
        {"kind": "instructions", "path": str(chats), "weight": 2},
        {"kind": "text", "path": str(documents), "weight": 2},
    ]
    datamodule = make_datamodule(mixture, tokenizer_file, workers=1)
    planner = datamodule.planner()
    loader = TrainLoader(planner, datamodule.collator, 1, datamodule.max_skipped, pin_memory=False)
    batches = iter(loader)
    done, left = 0, sorted(marks)
    next(batches)
    [worker] = multiprocessing.active_children()
    while left:
        while done < left[0]:
            batch = next(batches)
            planner.consumed(batch.step)
            done += int(batch.counters["samples"])
        left.pop(0)
        yield Held(done, status("VmRSS", worker.pid or 0), status("VmRSS"))


def memory(folder: Path, options: argparse.Namespace) -> Table:
    """Resident memory over many samples."""
    marks = [round(options.samples * share) for share in (0.01, 0.1, 0.25, 0.5, 0.75, 1)]
    rows = [[f"{h.samples:,}", f"{h.worker:,.1f}", f"{h.planning:,.1f}"] for h in memory_over(folder, marks)]
    return table("Resident memory, MB", ("samples", "data worker", "planning process"), rows)


BENCHMARKS = {"speed": speed, "startup": startup, "memory": memory}


def measure(options: argparse.Namespace) -> None:
    """Prints a table for each of the benchmarks."""
    torch.set_num_threads(1)
    for name in options.which or BENCHMARKS:
        if name not in BENCHMARKS:
            raise UserError(f"'{name}' is not one of {', '.join(BENCHMARKS)}")
        with (
            tempfile.TemporaryDirectory(dir=options.folder) as folder,
            patch.dict(os.environ, SPHINX_CACHE=f"{folder}/cache"),
        ):
            console().print(BENCHMARKS[name](Path(folder), options))


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__)
    command.add_argument("which", nargs="*", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    command.add_argument("--folder", type=Path, help="where to make the data (default: the system's temporary folder)")
    command.add_argument("--images", type=int, default=256, help="speed: photographs and documents")
    command.add_argument("--rounds", type=int, default=7, help="speed: turns of each contender")
    command.add_argument("--seconds", type=float, default=1.0, help="speed: of a turn")
    command.add_argument("--shards", type=int, default=1000, help="startup: tars")
    command.add_argument("--pairs", type=int, default=10_000, help="startup: pairs in a tar")
    command.add_argument("--lines", type=int, default=5_000_000, help="startup: entries of the instruction files")
    command.add_argument("--samples", type=int, default=100_000, help="memory: samples to load")
    return run_command(command, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
