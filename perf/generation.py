"""What answering costs: a second of decoding beside transformers, of beams and OPERA, and of an evaluation.

    python -m perf.generation transformers
    python -m perf.generation transformers --width 2048 --layers 16 --batch 8 --device cuda --precision bf16
    python -m perf.generation ways --batch 16
    python -m perf.generation evaluation --checkpoint outputs/demo/finetune/model --questions 1000

`transformers`: cached greedy decoding beside `generate` of a LLaMA with the same random weights; tokens are compared.
`ways`: greedy decoding, beam search and OPERA of the sample model with random weights, asked about random images. Only
generation is timed, in both.
`evaluation`: the test questions of data.test, beside bare generation of the same batches, whose prompts are tokenized
and pictures decoded before the clock starts. The evaluation does that while it is timed, scores the answers and keeps
its log on the disk. Without a checkpoint the model of train.py's overrides has random weights: most of its answers are
as long as they may be.

Contenders take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from perf.harness import configuration, console, parser, ratios, run_command, seconds, spread, table, turns, where
from sphinx_pl.checkpoints.families import FAMILIES
from sphinx_pl.checkpoints.tensors import TensorDict
from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import spread as spread_over
from sphinx_pl.data.records import read_records
from sphinx_pl.data.schema import IMAGE_SLOT, Record
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.evaluation.answer_log import AnswerLog
from sphinx_pl.evaluation.runner import evaluate, select
from sphinx_pl.generation.assistant import Assistant
from sphinx_pl.generation.generate import GenerationConfig, OperaConfig, Prompt, generate
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.device import autocast, choose_device

TEXT = 40
"""Tokens behind each random image."""
WAYS = {
    "greedy": GenerationConfig(),
    "beam 5": GenerationConfig(num_beams=5),
    "OPERA 5": GenerationConfig(num_beams=5, opera=OperaConfig()),
}


def theirs(model: Sphinx) -> Any:
    """transformers' model with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config.decoder
    values = {key: value for key, value in FAMILIES["llama"].config(config).items() if key != "architectures"}
    llama = LlamaForCausalLM(LlamaConfig(**values))
    decoder = {f"decoder.{name}": value for name, value in model.decoder.state_dict().items()}
    entries = FAMILIES["llama"].entries(TensorDict(decoder), config, None)
    llama.load_state_dict({name: e.make(decoder[e.name]) if e.make else decoder[e.name] for name, e in entries.items()})
    return llama.to(model.decoder.tok_embeddings.weight).eval()


def transformers(o: argparse.Namespace) -> None:
    """Prints tokens a second here and there."""
    device, dtype = choose_device(o.device), torch.bfloat16 if o.precision == "bf16" else torch.float32
    ffn = 8 * o.width // 3 // 64 * 64
    decoder = DecoderConfig(o.vocab, o.width, o.layers, o.heads, o.kv_heads, ffn, max_positions=o.prompt + o.new)
    model = Sphinx(SphinxConfig(decoder=decoder, vision=None)).to(device, dtype).eval()
    reference = theirs(model)
    ids = torch.randint(3, o.vocab, (o.batch, o.prompt), device=device)
    answers: dict[str, list[list[int]]] = {}

    def here() -> None:
        answers["here"] = generate(model, [Prompt(row) for row in ids.tolist()], GenerationConfig(max_new_tokens=o.new))

    def there() -> None:
        lengths = {"max_new_tokens": o.new, "min_new_tokens": o.new, "pad_token_id": 0, "eos_token_id": None}
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        answers["transformers"] = out[:, o.prompt :].tolist()

    times = timed({"here": here, "transformers": there}, device, o.rounds)
    rows = [
        [name, spread(values), f"{o.batch * o.new / statistics.median(values):,.0f}"] for name, values in times.items()
    ]
    title = f"{o.batch} rows, {o.prompt} + {o.new} tokens, {o.precision}, {where(device)}"
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    faster = spread(ratios(times["transformers"], times["here"]))
    caption = f"{faster} times as fast as transformers; {same} of {o.batch} rows have the same tokens"
    console().print(table(title, ("", "seconds", "tokens/s"), rows, caption))


def timed(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, after a first call of each that is not timed."""
    for run in runs.values():
        run()
    return turns({name: partial(seconds, run, device) for name, run in runs.items()}, rounds)


def random_prompts(model: Sphinx, count: int, new: int) -> list[Prompt]:
    """Images of noise, each with a text of noise behind it."""
    vision = model.config.vision
    assert vision is not None
    pixels = torch.randint(0, 256, (count, 1, 3, vision.image_size, vision.image_size), dtype=torch.uint8)
    texts = torch.randint(3, model.config.decoder.vocab_size, (count, TEXT)).tolist()
    slots = [IMAGE_SLOT] * sum(vision.view_tokens)
    return [Prompt([1, *slots, *text], image, new) for text, image in zip(texts, pixels, strict=True)]


def ways(o: argparse.Namespace) -> None:
    """Prints what each way to decode takes."""
    device = choose_device(o.device)
    model = Sphinx(SphinxConfig.from_dict(configuration("model=sphinx_sample").model)).to(device).eval()
    prompts = random_prompts(model, o.batch, o.new)
    times = timed({name: partial(generate, model, prompts, WAYS[name]) for name in o.ways}, device, o.rounds)
    first = times[o.ways[0]]
    rows = []
    for name, values in times.items():
        rates = (o.batch * o.new / statistics.median(values), o.batch / statistics.median(values))
        rows.append([name, spread(values), f"{rates[0]:,.0f}", f"{rates[1]:.1f}", spread(ratios(values, first), 1)])
    columns = ("", "seconds", "tokens/s", "answers/s", f"time, {o.ways[0]}'s = 1")
    console().print(table(f"{o.batch} answers of {o.new} tokens, {where(device)}", columns, rows))


def prepared(processor: Processor, records: Sequence[Record], batch_size: int) -> list[list[Prompt]]:
    """The batches that the evaluation makes, ready to be answered."""
    prompts = []
    for record in records:
        prompt = processor.prompt(record)
        pixels = [load_image(image, processor.image_size) for image in prompt.images]
        limit = TASKS[record.task].max_new_tokens
        prompts.append(Prompt(prompt.ids, torch.stack(pixels) if pixels else None, limit, prompt.kept_views))
    prompts.sort(key=lambda prompt: (prompt.max_new_tokens or 0, len(prompt.ids)))
    return [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]


def evaluation(o: argparse.Namespace) -> None:
    """Prints questions a second of bare generation and of the evaluation."""
    device = choose_device(o.device)
    cfg = configuration("stage=finetune", *o.overrides)
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    if o.checkpoint:
        assistant = Assistant.load(o.checkpoint, str(device), o.precision)
        model, processor = assistant.model, assistant.processor
    else:
        config = SphinxConfig.from_dict(cfg.model)
        processor = Processor.from_dict(data["processor"], data["tokenizer"], config)
        model = Sphinx(config).to(device).eval()
    questions = select(read_records(data["test"], "test")[0], None)
    records = [questions[index] for index in spread_over(len(questions), o.questions)]
    batches = prepared(processor, records, o.batch)
    greedy = GenerationConfig(eos_id=processor.tokenizer.eos_id, stop=processor.stop_sequences)

    def bare() -> None:
        for prompts in batches:
            generate(model, prompts, greedy)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            answer_log = AnswerLog(Path(folder), "tasks", {})
            evaluate(model, processor, records, batch_size=o.batch, answer_log=answer_log, progress=False)

    runs: dict[str, Callable[[], None]] = {"bare generation": bare, "evaluation": whole}
    with autocast(device, o.precision):
        generate(model, batches[0], greedy)  # what is only done once
        times = turns({name: partial(seconds, run, device) for name, run in runs.items()}, o.rounds)
    rows = [[name, spread(values), f"{len(records) / statistics.median(values):.1f}"] for name, values in times.items()]
    share = spread(ratios(times["bare generation"], times["evaluation"]))
    title = f"{len(records)} questions, batches of {o.batch}, {where(device)}"
    caption = f"The evaluation has {share} of the throughput of bare generation."
    console().print(table(title, ("", "seconds", "questions/s"), rows, caption))


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], dict[str, int]]] = {
    "transformers": (
        transformers,
        {"width": 512, "layers": 8, "heads": 8, "kv-heads": 8, "vocab": 32000, "prompt": 64, "new": 64, "batch": 8},
    ),
    "ways": (ways, {"batch": 16, "new": 32}),
    "evaluation": (evaluation, {"questions": 256, "batch": 32}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__)
    below = command.add_subparsers(required=True)
    for name, (function, numbers) in COMMANDS.items():
        one = below.add_parser(name)
        one.set_defaults(function=function)
        for key, default in {**numbers, "rounds": 7}.items():
            one.add_argument(f"--{key}", type=int, default=default, help=f"default: {default}")
        one.add_argument("--device", default="auto")
        one.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
        if name == "ways":
            one.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="default: all")
        if name == "evaluation":
            one.add_argument("--checkpoint", help="a trained model instead of random weights")
            one.add_argument("overrides", nargs="*", help="of train.py: the model and the data")

    def measure(options: Any) -> None:
        torch.manual_seed(0)
        options.function(options)

    return run_command(command, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
