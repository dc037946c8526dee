"""What ways of decoding cost: tokens and answers a second of greedy decoding, beam search and OPERA in one run.

    python -m benchmarks.decoding
    python -m benchmarks.decoding outputs/demo/finetune/model --data data/sample --limit 60

Without a checkpoint: the sample model with random weights, asked about random images, all answers of `--new` tokens.
With one: the sample data's test questions, `--limit` of each task, domain and topic, in batches as evaluate.py makes
them. Only generation is timed: prompts are made and images decoded before. So the difference to evaluate.py's time is
what evaluation adds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks.generation import seconds
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import build_reader
from sphinx_pl.data.schema import IMAGE_SLOT, Record
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.runner import select
from sphinx_pl.generation.generate import GenerationConfig, OperaConfig, Prompt, generate
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.hydra_app import report
from sphinx_pl.utils.errors import UserError

SAMPLE = Path(__file__).parents[1] / "conf" / "model" / "sphinx_sample.yaml"
TEXT = 40  # tokens behind each random image

WAYS = {
    "greedy": GenerationConfig(),
    "beam 5": GenerationConfig(num_beams=5),
    "OPERA 5": GenerationConfig(num_beams=5, opera=OperaConfig()),
}


def random_prompts(model: Sphinx, count: int, new: int) -> list[Prompt]:
    """Images of noise, each with a text of noise behind it."""
    vision = model.config.vision
    assert vision is not None
    pixels = torch.randint(0, 256, (count, 1, 3, vision.image_size, vision.image_size), dtype=torch.uint8)
    texts = torch.randint(3, model.config.decoder.vocab_size, (count, TEXT)).tolist()
    slots = [IMAGE_SLOT] * sum(vision.view_tokens)
    return [Prompt([1, *slots, *text], image, new) for text, image in zip(texts, pixels, strict=True)]


def prepared(model: Sphinx, processor: Processor, records: Sequence[Record]) -> tuple[list[Prompt], list[Record]]:
    """The records' questions with decoded images, shortest answers and prompts first, and the records in that order."""
    asked = []
    for record in records:
        prompt = processor.prompt(record)
        pixels = [load_image(image, processor.image_size) for image in prompt.images]
        room = model.config.decoder.max_positions - len(prompt.ids)
        limit = min(TASKS[record.task].max_new_tokens, room)
        asked.append((Prompt(prompt.ids, torch.stack(pixels) if pixels else None, limit, prompt.kept_views), record))
    asked.sort(key=lambda item: (item[0].max_new_tokens, len(item[0].ids)))
    return [prompt for prompt, _ in asked], [record for _, record in asked]


def answers(model: Sphinx, prompts: Sequence[Prompt], config: GenerationConfig, batch_size: int) -> list[list[int]]:
    """Token ids of the answers to all prompts, in batches."""
    return [
        answer
        for start in range(0, len(prompts), batch_size)
        for answer in generate(model, prompts[start : start + batch_size], config)
    ]


def load(path: str, device: str) -> tuple[Sphinx, Processor]:
    checkpoint = open_checkpoint(path)
    processor = Processor.from_dict(checkpoint.processor, checkpoint.tokenizer_file, checkpoint.model_config)
    model = Sphinx(checkpoint.model_config)
    checkpoint.load_into(model)
    return model.to(device).eval(), processor


def records_of(path: Path) -> list[Record]:
    """All records of an instruction file."""
    source = build_reader("instructions", "test", str(path))
    return [source.record(index) for index in range(len(source))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint folder (default: random weights)")
    parser.add_argument("--data", default="data/sample", type=Path, help="default: data/sample")
    for name, default in {"limit": 2, "batch": 32, "new": 32, "repeats": 3, "threads": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args(arguments)
    if o.threads:
        torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    try:
        if o.checkpoint:
            model, processor = load(o.checkpoint, o.device)
            file = o.data / "instructions" / "test.json"
            prompts, _ = prepared(model, processor, select(records_of(file), o.limit))
            ends = {"eos_id": processor.tokenizer.eos_id, "stop": processor.stop_sequences}
        else:
            model = Sphinx(SphinxConfig.from_dict(OmegaConf.load(SAMPLE))).to(o.device).eval()
            prompts, ends = random_prompts(model, o.batch, o.new), {}
    except (UserError, SkipSample) as error:
        return report(error)
    ways = {name: dataclasses.replace(WAYS[name], **ends) for name in o.ways}
    said = {name: answers(model, prompts, config, o.batch) for name, config in ways.items()}
    # In turn, so that what slows the machine for a while slows all.
    times = [
        {
            name: seconds(lambda config=config: answers(model, prompts, config, o.batch), torch.device(o.device))
            for name, config in ways.items()
        }
        for _ in range(o.repeats)
    ]
    title = f"{len(prompts)} answers in batches of {o.batch}, {o.device}, {torch.get_num_threads()} threads"
    table = Table("", "seconds", "tokens", "tokens/s", "answers/s", "time for an answer", title=title)
    first = next(iter(ways))
    for name in ways:
        median, count = statistics.median(each[name] for each in times), sum(map(len, said[name]))
        ratios = [each[name] / each[first] for each in times]
        table.add_row(
            name,
            f"{median:.2f}",
            str(count),
            f"{count / median:,.0f}",
            f"{len(prompts) / median:.1f}",
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
