"""Time, peak memory and exactness of mixing two checkpoints, beside a plain copy, mergekit and a loop in PyTorch.

    python -m perf.mix /tmp/mix --mergekit ENVIRONMENT/bin/mergekit-yaml    # 1.1 * 10^9 parameters; 15 GB of disk
    python -m perf.mix /tmp/mix --parameters 1e7 --rounds 1
    python -m perf.mix /tmp/mix --shape 13b                                 # memory alone; 28 GB of disk

Two Hugging Face folders of TinyLlama's shape with random bfloat16 values become one. The contenders take turns, each in
a process of its own: `cp -r` of one folder, mix_weights.py, mergekit's `linear` (in an environment of its own, `pip
install mergekit==0.1.5`, with its default options) and the loop that one would write. Inputs are in the page cache.
Every element of the results is compared with float64 arithmetic that is rounded once.

With `--shape 13b`, LLaMA-2 13B's shapes are mixed by mix_weights.py alone. Its inputs are sparse files, in which a
tensor has real values at its beginning and then zeros that take no disk; the mixture is written whole.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from perf.harness import TOKENIZER, Process, console, parser, run_command, run_process, spread, table, turns, warm
from sphinx_pl.checkpoints.folder import check_room
from sphinx_pl.utils.errors import UserError

WEIGHTS = (0.4, 0.6)
VOCAB_SIZE = 32_000
BEGINNING = 2**16
"""Elements of a tensor in a sparse file that are not 0."""
SHARD_BYTES = 10**10
"""As the published 13B files: one file of 26 GB cannot be mapped where there is less memory than that."""
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


@dataclass(frozen=True)
class Llama:
    """Sizes of a decoder in a Hugging Face folder."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its published name."""
        width, ffn = self.hidden_size, self.intermediate_size
        kv = width // self.num_attention_heads * self.num_key_value_heads
        layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (width, width) for name in "qo"}
        layer |= {f"self_attn.{name}_proj": (kv, width) for name in "kv"}
        layer |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
        layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        ends: dict[str, tuple[int, ...]] = {
            "model.embed_tokens": (VOCAB_SIZE, width),
            "model.norm": (width,),
            "lm_head": (VOCAB_SIZE, width),
        }
        for number in range(self.num_hidden_layers):
            ends |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        return {f"{name}.weight": shape for name, shape in ends.items()}

    @property
    def count(self) -> int:
        """Parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


LLAMA_13B = Llama(5120, 40, 40, 40, 13824)


def tinyllama(parameters: float) -> Llama:
    """TinyLlama's proportions with about `parameters` parameters; at 1.1 * 10^9 its sizes."""

    def of(width: int) -> Llama:
        heads = width // 64
        kv_heads = next(few for few in range(max(1, heads // 8), 0, -1) if heads % few == 0)
        return Llama(width, max(1, round(22 * width / 2048)), heads, kv_heads, 32 * round(width * 5632 / 2048 / 32))

    return min((of(width) for width in range(64, 4096 + 1, 64)), key=lambda sizes: abs(sizes.count - parameters))


def write_model(folder: Path, sizes: Llama, seed: str, values: int | None = None) -> None:
    """A Hugging Face folder of random bfloat16 numbers, spread as trained ones are.

    Args:
        values: elements at a tensor's beginning that are not 0; None: all. Zeros take no disk.
    """
    folder.mkdir(parents=True)
    shards: list[dict[str, int]] = [{}]
    for name, shape in sizes.shapes.items():
        if sum(shards[-1].values()) + 2 * torch.Size(shape).numel() > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = 2 * torch.Size(shape).numel()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, sizes.shapes, shard, seed, values)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 2 * sizes.count}, "weight_map": weight_map}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, **vars(sizes)}
    config |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048}
    config |= {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    # With a tokenizer's configuration, mergekit copies the tokenizer; without, it would load it.
    tokenizer = {"tokenizer_class": "LlamaTokenizer"}
    contents = {"model.safetensors.index": index, "config": config, "tokenizer_config": tokenizer}
    for stem, content in contents.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")


def _write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], shard: Mapping[str, int], seed: str, values: int | None
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shard.items():
        header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        file.truncate(begin + end)
        for name, size in shard.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            value = torch.randn(min(values or size, size // 2), generator=generator)
            value = value.mul_(0.1).add_(1) if len(shapes[name]) == 1 else value.mul_(0.02)
            file.seek(begin)
            file.write(value.bfloat16().view(torch.uint8).numpy().data)
            begin += size


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


class Folder:
    """The tensors of a folder of safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [safe_open(file, "pt") for file in sorted(path.glob("*.safetensors"))]
        self.files: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        """[elements]"""
        return torch.as_tensor(self.files[name].get_tensor(name)).reshape(-1)


def deviations(outs: Mapping[str, Folder], inputs: Sequence[Folder], weights: Sequence[float]) -> Counter[str]:
    """How many elements of each result are not the weighted sum in float64, rounded once.

    Raises:
        UserError: other tensors, or not bfloat16.
    """
    names = inputs[0].files.keys()
    if others := [out for out in outs.values() if out.files.keys() != names]:
        raise UserError(f"'{others[0].path}' does not have the tensors of '{inputs[0].path}'")
    counts: Counter[str] = Counter(dict.fromkeys(outs, 0))
    for name in names:
        values = [folder.tensor(name) for folder in inputs]
        results = {out: folder.tensor(name) for out, folder in outs.items()}
        for tensor in (*values, *results.values()):
            if tensor.dtype != torch.bfloat16 or len(tensor) != len(values[0]):
                raise UserError(f"'{name}' is not bfloat16 of one shape everywhere")
        for start in range(0, len(values[0]), CHUNK):
            cut = slice(start, start + CHUNK)
            exact = sum((w * value[cut].double() for w, value in zip(weights, values, strict=True)), torch.zeros(()))
            expected = rounded_once(exact).view(torch.int16)
            for out, result in results.items():
                counts[out] += int((result[cut].view(torch.int16) != expected).count_nonzero())
    return counts


# -- runs ------------------------------------------------------------------------------------------------------------


def ours(inputs: Sequence[Path], out: Path) -> list[str]:
    arguments = [f"checkpoints=[{','.join(map(str, inputs))}]", f"weights=[{','.join(map(str, WEIGHTS))}]"]
    script = str(Path(__file__).parents[1] / "mix_weights.py")
    return [sys.executable, script, *arguments, f"out={out}", f"hydra.run.dir={out.with_name('hydra')}"]


def commands(folder: Path, mergekit: Path | None) -> dict[str, tuple[Path, list[str]]]:
    """Name -> folder that is written, command."""
    inputs = [folder / name for name in BOTH]
    outs = {name: folder / f"out-{name}" for name in ("cp", "ours", "mergekit", "loop")}
    lines = {"cp": ["cp", "-r", str(inputs[0]), str(outs["cp"])], "ours": ours(inputs, outs["ours"])}
    if mergekit:
        models = [{"model": str(path), "parameters": {"weight": w}} for path, w in zip(inputs, WEIGHTS, strict=True)]
        recipe = folder / "mergekit.yaml"  # JSON is YAML
        recipe.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "bfloat16"}))
        lines["mergekit"] = [str(mergekit), str(recipe), str(outs["mergekit"])]
    lines["loop"] = [sys.executable, "-c", LOOP, *map(str, (*inputs, outs["loop"], *WEIGHTS))]
    return {name: (outs[name], command) for name, command in lines.items()}


def inside(process: Process) -> float | None:
    """Seconds that a command names itself ("in 1.2 s"), which are those without its imports."""
    named = re.findall(r"\bin ([\d.]+) s\b", process.printed)
    return float(named[-1]) if named else None


def rows(results: Mapping[str, Sequence[Process]], off: Mapping[str, int]) -> list[list[str]]:
    """A row for each contender: medians, and the range of the seconds until the bytes were on the disk."""
    copied = [process.synced for process in results.get("cp", ())]
    lines = []
    for name, processes in results.items():
        named = [seconds for process in processes if (seconds := inside(process)) is not None]
        synced = [process.synced for process in processes]
        cells = [f"{processes[0].gb:.2f}", f"{statistics.median(process.ended for process in processes):.2f}"]
        cells += [spread(synced), f"{statistics.median(named):.2f}" if named else ""]
        cells += [f"{statistics.median(synced) / statistics.median(copied):.2f}" if copied else ""]
        cells += [f"{statistics.median(getattr(p, key) for p in processes):,.0f}" for key in ("peak", "anonymous")]
        lines.append([name, *cells, f"{off[name]:,}" if name in off else ""])
    return lines


COLUMNS = (
    "",
    "GB",
    "ends after s",
    "on the disk after s",
    "without imports s",
    "time / cp's",
    "peak MB",
    "anonymous MB",
)


def measure(options: argparse.Namespace) -> None:
    """Prints the table of contenders, or that of memory."""
    folder, large = options.folder.absolute(), options.shape == "13b"
    sizes = LLAMA_13B if large else tinyllama(options.parameters)
    if folder.exists():
        raise UserError(f"{folder} exists")
    folder.mkdir(parents=True)
    try:
        check_room(folder, (2 if large else 13) * sizes.count)  # two inputs, four results, 2 bytes each
        for model in BOTH:
            write_model(folder / model, sizes, model, BEGINNING if large else None)
        lines = {name: line for name, line in commands(folder, options.mergekit).items() if not large or name == "ours"}

        def contender(out: Path, command: Sequence[str]) -> Process:
            for model in BOTH:
                warm(folder / model)
            return run_process(command, out)

        contenders = {name: partial(contender, *line) for name, line in lines.items()}
        results = turns(contenders, 1 if large else options.rounds)
        outs = {name: Folder(out) for name, (out, _) in lines.items() if name != "cp"}
        off = deviations(outs, [Folder(folder / model) for model in BOTH], WEIGHTS)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    title = f"{sizes.count:,} parameters in bfloat16, medians of {len(results['ours'])}"
    console().print(table(title, (*COLUMNS, "elements that differ from float64"), rows(results, off)))


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__)
    command.add_argument("folder", type=Path, help="a folder that does not exist, on the disk to measure")
    command.add_argument("--parameters", type=float, default=1.1e9, help="about this many (default: 1.1e9)")
    command.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    command.add_argument("--mergekit", type=Path, help="its command, mergekit-yaml, to be measured as well")
    command.add_argument("--shape", choices=("tinyllama", "13b"), default="tinyllama", help="13b: mix_weights.py only")
    command.add_argument("--keep", action="store_true", help="leave the folder there")
    return run_command(command, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
