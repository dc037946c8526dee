"""Questions per second of an evaluation, beside bare batched generation of the same answers in the same run.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --checkpoint outputs/demo/finetune/model --questions 1000
    python -m benchmarks.evaluation model=sphinx_sample_1k data.root=data/sample

Bare: prompts are tokenized and pictures decoded before the clock starts, and the batches are those of the evaluation.
The evaluation does all that while it is timed, scores the answers, and keeps a journal on the disk. Both take turns.
Without a checkpoint the model is that of train.py's overrides, with random weights: its answers are nonsense, mostly as
long as they may be.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks.generation import seconds
from benchmarks.step import where
from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import spread
from sphinx_pl.data.records import read_records
from sphinx_pl.data.schema import Record
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.answer_log import Journal
from sphinx_pl.evaluation.runner import evaluate, select
from sphinx_pl.generation.assistant import Assistant
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.device import autocast, choose_device
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER, register_resolvers, report
from sphinx_pl.utils.errors import UserError


def prepared(processor: Processor, records: Sequence[Record], batch_size: int) -> list[list[Prompt]]:
    """The batches that the evaluation makes, ready to be answered."""
    prompts = []
    for record in records:
        asked = processor.prompt(record)
        pixels = [load_image(image, processor.image_size) for image in asked.images]
        limit = TASKS[record.task].max_new_tokens
        prompts.append(Prompt(asked.ids, torch.stack(pixels) if pixels else None, limit, asked.kept_views))
    prompts.sort(key=lambda prompt: (prompt.max_new_tokens or 0, len(prompt.ids)))
    return [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]


def compare(
    model: Sphinx, processor: Processor, records: Sequence[Record], batch_size: int, rounds: int, precision: str
) -> list[tuple[float, float]]:
    """(bare, evaluation) seconds of each round."""
    device = model.decoder.tok_embeddings.weight.device
    batches = prepared(processor, records, batch_size)
    config = GenerationConfig(eos_id=processor.tokenizer.eos_id, stop=processor.stop_sequences)

    def bare() -> None:
        for prompts in batches:
            generate(model, prompts, config)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder), "tasks", {})
            evaluate(model, processor, records, batch_size=batch_size, journal=journal, progress=False)

    with autocast(device, precision):
        generate(model, batches[0], config)  # what is only done once
        return [(seconds(bare, device), seconds(whole, device)) for _ in range(rounds)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py: the model and the data")
    parser.add_argument("--checkpoint", help="a trained model instead of random weights")
    parser.add_argument("--questions", type=int, default=256, help="of data.test, spread over it (default: 256)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    o = parser.parse_args(arguments)
    register_resolvers()
    try:
        device = choose_device(o.device)
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            cfg = compose("train", ["stage=finetune", *o.overrides])
        data: Any = OmegaConf.to_container(cfg.data, resolve=True)
        if o.checkpoint:
            assistant = Assistant.load(o.checkpoint, str(device), o.precision)
            model, processor = assistant.model, assistant.processor
        else:
            config = SphinxConfig.from_dict(cfg.model)
            processor = Processor.from_dict(data["processor"], data["tokenizer"], config)
            torch.manual_seed(0)
            model = Sphinx(config).to(device).eval()
        found = select(read_records(data["test"], "test")[0], None)
        records = [found[index] for index in spread(len(found), o.questions)]
        times = compare(model, processor, records, o.batch_size, o.rounds, o.precision)
    except (UserError, HydraException) as error:
        return report(error)
    table = Table(
        "", "seconds", "questions/s", title=f"{len(records)} questions, batches of {o.batch_size}, {where(device)}"
    )
    for place, name in enumerate(("bare generation", "evaluation")):
        median = statistics.median(pair[place] for pair in times)
        table.add_row(name, f"{median:.2f}", f"{len(records) / median:.1f}")
    ratios = sorted(bare / whole for bare, whole in times)
    console = Console()
    console.print(table)
    console.print(
        f"The evaluation has {statistics.median(ratios):.2f} of the throughput of bare generation ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f} in {o.rounds} pairs)",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
