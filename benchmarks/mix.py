"""Time, peak memory and exactness of mixing two checkpoints, beside a plain copy, mergekit and a loop in PyTorch.

    python -m benchmarks.mix /tmp/mix --mergekit ENVIRONMENT/bin/mergekit-yaml    # 1.1 * 10^9 parameters; 15 GB of disk
    python -m benchmarks.mix /tmp/mix --parameters 1e7 --rounds 1
    python -m benchmarks.mix /tmp/mix --shape 13b                                 # memory alone; 28 GB of disk

Two Hugging Face folders of TinyLlama's shape with random bfloat16 values become one, in turns and each in a process of
its own: by `cp -r` (of one of them), by mix_weights.py, by mergekit's `linear` (in an environment of its own:
`pip install mergekit==0.1.5`; its options are the defaults) and by the loop that one would write. What is read was read
just before, so it comes from the page cache, for all alike. GB/s are of what is written. Memory is the process's VmHWM
in /proc, mapped pages of files included. Every element of the results is compared with float64 arithmetic that is
rounded once.

With `--shape 13b` only memory, and mix_weights.py alone: with that model and with LLaMA-2 13B's shapes. The inputs of
the latter are sparse files, in which a tensor has real values at its beginning and then zeros that take no disk; the
mixture is written whole.

The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.consolidation import VOCAB_SIZE, Run, run, warm
from sphinx_pl.checkpoints.folder import CONFIG, INDEX, TOKENIZER, check_room, write_json
from sphinx_pl.checkpoints.format import Checkpoint, open_checkpoint
from sphinx_pl.checkpoints.huggingface import huggingface_config
from sphinx_pl.checkpoints.llama import llama_entries
from sphinx_pl.checkpoints.output import safetensors_folder
from sphinx_pl.checkpoints.tensors import TensorInfo, TensorReader, compare
from sphinx_pl.checkpoints.writer import CheckpointWriter
from sphinx_pl.models.config import DecoderConfig
from sphinx_pl.models.decoder import Decoder
from sphinx_pl.runtime.hydra_app import report
from sphinx_pl.utils.errors import UserError

WEIGHTS = (0.4, 0.6)
LLAMA_13B = DecoderConfig(VOCAB_SIZE, width=5120, layers=40, heads=40, kv_heads=40, ffn_width=13824)
BEGINNING = 2**16
"""Elements of a tensor in a sparse file that are not 0."""
SPARSE_SHARD_BYTES = 10**10
"""As the published 13B files; one file of 26 GB cannot be mapped where there is less memory than that."""
CHUNK = 2**15
"""Elements that are compared at once: what is computed of them stays in the cache, in one thread."""
BOTH = ("a", "b")

LOOP = """
import shutil, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
def load(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
first, second, out = map(Path, sys.argv[1:4])
x, y = map(float, sys.argv[4:])
a, b = load(first), load(second)
mixed = {name: (x * a[name].float() + y * b[name].float()).to(a[name].dtype) for name in a}
out.mkdir()
save_file(mixed, out / "model.safetensors", {"format": "pt"})
for file in first.glob("*[!x].json"):
    shutil.copy(file, out)
"""


# -- the checkpoints -------------------------------------------------------------------------------------------------


def tinyllama(parameters: float) -> DecoderConfig:
    """TinyLlama's proportions with about so many parameters; at 1.1 * 10^9 its sizes."""

    def of(width: int) -> DecoderConfig:
        heads = width // 64
        kv_heads = next(few for few in range(max(1, heads // 8), 0, -1) if heads % few == 0)
        layers, ffn = max(1, round(22 * width / 2048)), 32 * round(width * 5632 / 2048 / 32)
        return DecoderConfig(VOCAB_SIZE, width, layers, heads, kv_heads, ffn, max_positions=2048)

    return min((of(width) for width in range(64, 4096 + 1, 64)), key=lambda config: abs(count(config) - parameters))


def count(config: DecoderConfig) -> int:
    """Parameters of a model."""
    kv_width = config.width // config.heads * config.kv_heads
    matrices = config.width * (2 * config.width + 2 * kv_width + 3 * config.ffn_width)
    return 2 * config.vocab_size * config.width + config.layers * (matrices + 2 * config.width) + config.width


class Random(TensorReader):
    """Weights of a decoder, spread as trained ones are; another seed differs in every tensor."""

    def __init__(self, config: DecoderConfig, seed: str) -> None:
        with torch.device("meta"):
            state = Decoder(config).state_dict()
        self.infos = {f"decoder.{name}": TensorInfo(tuple(t.shape), torch.bfloat16) for name, t in state.items()}
        self._seed = seed

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def info(self, name: str) -> TensorInfo:
        return self.infos[name]

    def tensor(self, name: str) -> Tensor:
        shape = self.infos[name].shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        value = torch.randn(shape, generator=generator)
        return (value.mul_(0.1).add_(1) if len(shape) == 1 else value.mul_(0.02)).bfloat16()


def write_rest(folder: Path, config: DecoderConfig, tokenizer: Path) -> None:
    """What makes weights a folder that all of them read."""
    write_json(folder / CONFIG, huggingface_config(config, "bfloat16"))
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    # With it, mergekit copies the tokenizer; without, it would load it.
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})


def write_random(folder: Path, config: DecoderConfig, seed: str, tokenizer: Path) -> None:
    reader = Random(config, seed)
    files = safetensors_folder(llama_entries(reader, config), lambda out: write_rest(out, config, tokenizer))
    CheckpointWriter(folder, files).write(reader)


def write_sparse(
    folder: Path, config: DecoderConfig, seed: str, tokenizer: Path, max_bytes: int = SPARSE_SHARD_BYTES
) -> None:
    """The same with real values at the beginning of each tensor only, so that none is equal in two checkpoints."""
    folder.mkdir(parents=True)
    entries = llama_entries(Random(config, seed), config)
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, entry in entries.items():
        if sum(info.nbytes for info in shards[-1].values()) + entry.info.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = entry.info
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_sparse_file(folder / file, shard, seed)
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {"total_size": 2 * count(config)}, "weight_map": weight_map})
    write_rest(folder, config, tokenizer)


def _write_sparse_file(path: Path, infos: Mapping[str, TensorInfo], seed: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins = {}
    end = 0
    for name, info in infos.items():
        begins[name] = end
        header[name] = {"dtype": "BF16", "shape": info.shape, "data_offsets": [end, end := end + info.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, begin in begins.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            value = torch.randn(min(BEGINNING, infos[name].numel), generator=generator).mul_(0.02).bfloat16()
            file.seek(8 + len(text) + begin)
            file.write(value.view(torch.uint8).numpy().data)


# -- exactness -------------------------------------------------------------------------------------------------------


def rounded_once(exact: Tensor) -> Tensor:
    """float64 -> the nearest bfloat16, ties to even.

    PyTorch rounds to float32 on the way, and so to the wrong side where that makes a tie. Here what float32 cannot hold
    is kept in its last bit (rounding to odd), which is below all that decides the second rounding.
    """
    near = exact.float()
    back = near.double()
    bits = near.view(torch.int32) - (back.abs() > exact.abs()).int()
    return (bits | (back != exact).int()).view(torch.float32).bfloat16()


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between two; 0 and -0 are one."""

    def place(tensor: Tensor) -> Tensor:
        bits = tensor.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(a) - place(b)).abs()


def deviations(
    outs: Mapping[str, Checkpoint], inputs: Sequence[Checkpoint], weights: Sequence[float]
) -> dict[str, Counter[int]]:
    """What was compared -> distance in ulps -> how many elements are so far apart.

    Every result is compared with Σ wᵢ·xᵢ in float64, rounded once, and the first one with the others.

    Raises:
        UserError: other tensors, or not bfloat16.
    """
    wanted = {name: inputs[0].info(name).shape for name in inputs[0]}
    for out in outs.values():
        if problem := compare(wanted, {name: out.info(name).shape for name in out}):
            raise UserError(f"'{out.path}' does not have the tensors of '{inputs[0].path}': {problem}")
    first, *others = outs
    found: dict[str, Counter[int]] = {f"{name} and float64 rounded once": Counter() for name in outs}
    found |= {f"{first} and {name}": Counter() for name in others}
    for name in wanted:
        tensors = [checkpoint.tensor(name).reshape(-1) for checkpoint in (*inputs, *outs.values())]
        if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
            raise UserError(f"'{name}' is not bfloat16 everywhere")
        for start in range(0, len(tensors[0]), CHUNK):
            chunks = [tensor[start : start + CHUNK] for tensor in tensors]
            values, results = chunks[: len(inputs)], chunks[len(inputs) :]
            expected = _mixed(values, weights)
            pairs = [*((result, expected) for result in results), *((results[0], other) for other in results[1:])]
            for counted, (x, y) in zip(found.values(), pairs, strict=True):
                differing = x.view(torch.int16) != y.view(torch.int16)
                if number := int(differing.count_nonzero()):
                    counted.update(ulps(x[differing], y[differing]).tolist())
                counted[0] += len(x) - number
    return found


def _mixed(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if not any(bool(value.any()) for value in values):
        return torch.zeros_like(values[0])  # most of what sparse files hold
    exact = values[0].double() * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        exact += value.double() * weight
    return rounded_once(exact)


def in_words(found: Counter[int]) -> str:
    """Deviations as a phrase. Where terms cancel, what float32 makes of the rest can be thousands of ulps off."""
    off = {distance: number for distance, number in found.items() if distance}
    if not off:
        return f"all {found.total():,} elements are the same"
    few, many = (sum(n for ulp, n in off.items() if low <= ulp < high) for low, high in ((2, 10), (10, 2**17)))
    parts = f"{off.get(1, 0):,} by 1 ulp, {few:,} by 2 to 9, {many:,} by more"
    return f"{sum(off.values()):,} of {found.total():,} elements differ: {parts}, at most {max(off):,}"


# -- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed:
    """`inside`: seconds that the command itself named ("in 1.2 s"), which are those without its imports."""

    run: Run
    inside: float | None


def ours(inputs: Sequence[Path], out: Path) -> list[str]:
    script = Path(__file__).parents[1] / "mix_weights.py"
    checkpoints = ",".join(map(str, inputs))
    weights = ",".join(map(str, WEIGHTS))
    arguments = [f"checkpoints=[{checkpoints}]", f"weights=[{weights}]", f"out={out}"]
    return [sys.executable, str(script), *arguments, f"hydra.run.dir={out.with_name('hydra')}"]


def commands(folder: Path, mergekit: Path | None) -> dict[str, tuple[Path, list[str]]]:
    """Name -> folder that is written, command."""
    inputs = [folder / name for name in BOTH]
    made = {name: folder / f"out-{name}" for name in ("cp", "ours", "mergekit", "loop")}
    found = {"cp": ["cp", "-r", str(inputs[0]), str(made["cp"])], "ours": ours(inputs, made["ours"])}
    if mergekit:
        models = [
            {"model": str(path), "parameters": {"weight": weight}} for path, weight in zip(inputs, WEIGHTS, strict=True)
        ]
        recipe = folder / "mergekit.yaml"  # JSON is YAML
        recipe.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "bfloat16"}))
        found["mergekit"] = [str(mergekit), str(recipe), str(made["mergekit"])]
    found["loop"] = [sys.executable, "-c", LOOP, *map(str, (*inputs, made["loop"], *WEIGHTS))]
    return {name: (made[name], command) for name, command in found.items()}


def mix(command: Sequence[str], out: Path) -> Mixed:
    said = out.with_name("said")  # of which `run` makes the name of a log
    measured = run(command, out, said)
    named = re.findall(r"\bin ([\d.]+) s\b", said.with_suffix(".log").read_text())
    return Mixed(measured, float(named[-1]) if named else None)


def measure(folder: Path, rounds: int, mergekit: Path | None) -> dict[str, list[Mixed]]:
    found: dict[str, list[Mixed]] = {name: [] for name in commands(folder, mergekit)}
    for _ in range(rounds):
        for name, (out, command) in commands(folder, mergekit).items():
            for model in BOTH:
                warm(folder / model)
            found[name].append(mix(command, out))
    return found


def check(folder: Path, made: Mapping[str, Path]) -> list[str]:
    """Sentences about how exact the results are."""
    inputs = [open_checkpoint(folder / name) for name in BOTH]
    found = deviations({name: open_checkpoint(path) for name, path in made.items()}, inputs, WEIGHTS)
    return [f"{compared}: {in_words(deviating)}" for compared, deviating in found.items()]


def results(found: dict[str, list[Mixed]], title: str) -> Table:
    """Medians over the rounds, with the range of the seconds that count."""
    table = Table(title=title)
    columns = ("", "GB", "ends after s", "on the disk after s", "without imports s", "time / cp's", "GB/s", "peak MB")
    for column in (*columns, "of it anonymous"):
        table.add_column(column, justify="right")

    def middle(runs: list[Mixed], key: str) -> float:
        return float(statistics.median(getattr(mixed.run, key) for mixed in runs))

    for name, runs in found.items():
        seconds = [mixed.run.process for mixed in runs]
        inside = [mixed.inside for mixed in runs if mixed.inside is not None]
        size = runs[0].run.written / 1e9
        table.add_row(
            name,
            f"{size:.2f}",
            f"{middle(runs, 'returned'):.2f}",
            f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})",
            f"{statistics.median(inside):.2f}" if inside else "",
            f"{statistics.median(seconds) / middle(found['cp'], 'process'):.2f}",
            f"{size / statistics.median(seconds):.2f}",
            f"{middle(runs, 'peak'):,.0f}",
            f"{middle(runs, 'anonymous'):,.0f}",
        )
    return table


def wide() -> Console:
    """Where the table can be read in a log, too."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


# -- the two parts ---------------------------------------------------------------------------------------------------


def time_and_memory(folder: Path, config: DecoderConfig, rounds: int, mergekit: Path | None, tokenizer: Path) -> None:
    """Prints a table and the deviations."""
    console = wide()
    check_room(folder, 13 * count(config))  # two inputs, four results, 2 bytes each
    for model in BOTH:
        write_random(folder / model, config, model, tokenizer)
    found = measure(folder, rounds, mergekit)
    console.print(results(found, f"{count(config) / 1e6:,.0f} * 10^6 parameters in bfloat16, medians of {rounds}"))
    made = {name: out for name, (out, _) in commands(folder, mergekit).items() if name != "cp"}
    for line in check(folder, made):
        console.print(line)


def memory(folder: Path, real: DecoderConfig, sparse: DecoderConfig, tokenizer: Path) -> None:
    """Prints mix_weights.py's peaks with both models."""
    console = wide()
    check_room(folder, max(7 * count(real), 2 * count(sparse) + 10**9))
    title = "memory of mix_weights.py"
    table = Table("", "parameters", "GB written", "largest tensor MB", "peak MB", "of it anonymous", title=title)
    said = []
    for name, config, write in (("real", real, write_random), ("sparse", sparse, write_sparse)):
        inside = folder / name
        for model in BOTH:
            write(inside / model, config, model, tokenizer)
        out = inside / "out"
        mixed = mix(ours([inside / model for model in BOTH], out), out).run
        largest = max(info.nbytes for info in Random(config, "").infos.values())
        sizes = (f"{count(config):.2e}", f"{mixed.written / 1e9:.2f}", f"{largest / 1e6:,.0f}")
        table.add_row(f"{name} values", *sizes, f"{mixed.peak:,.0f}", f"{mixed.anonymous:,.0f}")
        said += [f"{name} values: {line}" for line in check(inside, {"ours": out})]
        shutil.rmtree(inside)
    console.print(table)
    for line in said:
        console.print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that does not exist, on the disk to measure")
    parser.add_argument("--parameters", type=float, default=1.1e9, help="about so many (default: 1.1e9)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--mergekit", type=Path, help="its command, mergekit-yaml, to be measured as well")
    parser.add_argument("--shape", choices=("tinyllama", "13b"), default="tinyllama", help="13b: memory only")
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    parser.add_argument("--tokenizer", type=Path, default=Path("tests/golden/tokenizer.model"))
    o = parser.parse_args(arguments)
    if o.folder.exists():
        parser.error(f"{o.folder} exists")
    if o.mergekit and not o.mergekit.is_file():
        parser.error(f"{o.mergekit} is not there")
    folder, config = o.folder.absolute(), tinyllama(o.parameters)
    try:
        folder.mkdir(parents=True)
        if o.shape == "13b":
            memory(folder, config, LLAMA_13B, o.tokenizer)
        else:
            time_and_memory(folder, config, o.rounds, o.mergekit, o.tokenizer)
    except UserError as error:
        return report(error)
    finally:
        if not o.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
