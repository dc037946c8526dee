"""`sphinx-checkpoint COMMAND`: show a checkpoint, import other layouts, export to
them."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from sphinx_pl.checkpoints.folder import PROVENANCE, check_room
from sphinx_pl.checkpoints.format import Checkpoint, open_checkpoint, with_common_names
from sphinx_pl.checkpoints.hub import local_folder
from sphinx_pl.checkpoints.huggingface import HuggingFaceFolder, exported_family, open_model, write_huggingface
from sphinx_pl.checkpoints.huggingface_files import is_huggingface
from sphinx_pl.checkpoints.native import check_free, write_checkpoint
from sphinx_pl.checkpoints.original import Restored, write_original
from sphinx_pl.checkpoints.provenance import provenance
from sphinx_pl.checkpoints.tensors import TensorInfo, content_hash
from sphinx_pl.data.prompt_formats import SYSTEM
from sphinx_pl.mixing.show import distances_table
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.hydra_app import report
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import check_folder

PATH = "a checkpoint folder of any layout that this project reads, a GGUF file, or hf-hub:OWNER/NAME[@REVISION]"


def parts_table(checkpoint: Checkpoint | HuggingFaceFolder) -> Table:
    """Return a table of tensors, parameters, dtypes and bytes of each part: an encoder, or a module
    such as `decoder.layers`."""
    infos: dict[str, list[TensorInfo]] = defaultdict(list)
    for name in checkpoint:
        words = name.split(".")
        infos[".".join(words[: 3 if words[1:2] == ["towers"] else 2])].append(checkpoint.info(name))
    table = Table(title=Text(str(checkpoint.path)), show_footer=True)
    everything = [info for group in infos.values() for info in group]
    columns = {
        "part": ([*infos], "total"),
        "tensors": ([len(group) for group in infos.values()], len(everything)),
        "parameters": ([sum(i.numel for i in group) for group in infos.values()], sum(i.numel for i in everything)),
        "MiB": ([_mebibytes(group) for group in infos.values()], _mebibytes(everything)),
        "dtype": ([_dtypes(group) for group in infos.values()], ""),
    }
    for title, (_, footer) in columns.items():
        table.add_column(title, _text(footer), justify="left" if title in ("part", "dtype") else "right")
    for row in zip(*(cells for cells, _ in columns.values()), strict=True):
        table.add_row(*map(_text, row))
    return table


def provenance_table(checkpoint: Checkpoint | HuggingFaceFolder) -> Table:
    """A table of the provenance without the composed configuration."""
    table = Table("provenance", "", show_header=True)
    for key, value in checkpoint.provenance.items():
        if key == "parents":
            for parent in value:
                kind = next((kind for kind in ("xxh3_128", "sha256") if kind in parent), "")
                stage = f" ({parent['stage']})" if parent["stage"] else ""
                table.add_row("parent", Text(f"{parent['path']}{stage} {kind} {parent.get(kind, '')[:16]}…"))
        elif key == "mixing":
            for name, item in value.items():
                if name == "rules" and len(item) > 1:
                    for rule in item:
                        ends = " → ".join(", ".join(f"{w:g}" for w in point) for point in rule["weights"])
                        table.add_row("mixing", Text(f"{rule['tensors']}: {ends} ({rule['number']} tensors)"))
                elif name not in ("parts", "rules") and item not in (None, {}, []):
                    pairs = item.items() if isinstance(item, dict) else [("", item)]
                    table.add_row("mixing", Text(f"{name} " + ", ".join(f"{n} {v}".strip() for n, v in pairs)))
        elif key == "command":
            table.add_row(key, Text(" ".join(map(str, value)) if isinstance(value, list) else str(value)))
        elif key != "config":
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            table.add_row(Text(key), Text(", ".join(f"{name} {item}".strip() for name, item in pairs)))
    return table


def _text(value: Any) -> Text:
    """Return plain text. Names and paths may hold brackets, which are not markup."""
    return Text(f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else str(value))


def _mebibytes(group: list[TensorInfo]) -> float:
    return float(sum(info.numel * info.dtype.itemsize for info in group) / 2**20)


def _dtypes(group: list[TensorInfo]) -> str:
    return ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in group}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sphinx-checkpoint", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    show = commands.add_parser("show", help="parts, dtypes, parameter counts and provenance")
    show.add_argument("path", help=PATH)
    show.add_argument(
        "--hash",
        action="store_true",
        help="also print the hash that a mixture of it names (reads it all)",
    )
    importer = commands.add_parser("import", help="write a checkpoint of another layout in ours")
    importer.add_argument("path", help=PATH)
    importer.add_argument("out", help="the folder to write")
    importer.add_argument("--base", help="the weights to which .model-diff.pth files add, such as LLaMA-2")
    importer.add_argument("--overwrite", action="store_true", help="overwrite an existing checkpoint")
    exporter = commands.add_parser("export", help="write a checkpoint in the original's layout, or its decoder in HF's")
    exporter.add_argument("path", help=PATH)
    exporter.add_argument("out", help="the folder to write")
    exporter.add_argument("--to", choices=("original", "huggingface"), required=True, help="the layout")
    exporter.add_argument(
        "--family", help="Hugging Face's class to export for: llama, phi3, ... (default: the first that fits)"
    )
    exporter.add_argument("--shards", type=int, default=1, help="files of the original's layout (default: 1)")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.command == "show":
            return _show(options, console)
        checkpoint = open_checkpoint(options.path)
        if options.command == "import":
            checkpoint = Restored(checkpoint, open_checkpoint(options.base)) if options.base else checkpoint
            import_checkpoint(checkpoint, options.out, options.overwrite)
            if note := checkpoint.provenance.get("note"):
                console.print(note)
            checkpoint = open_checkpoint(options.out)
        elif options.command == "export":
            return _export(checkpoint, options, console)
    except UserError as error:
        return report(error)
    console.print(parts_table(checkpoint), provenance_table(checkpoint))
    return 0


def _show(options: argparse.Namespace, console: Console) -> int:
    folder = local_folder(options.path)
    checkpoint: Checkpoint | HuggingFaceFolder
    try:
        checkpoint = open_checkpoint(folder)
    except UserError:
        if not is_huggingface(folder):
            raise
        checkpoint = HuggingFaceFolder(folder)  # a model that this project lacks can still be mixed
    console.print(parts_table(checkpoint))
    try:
        tables = [provenance_table(checkpoint)]
        if mixing := checkpoint.provenance.get("mixing"):
            tables.append(distances_table(mixing))
        console.print(*tables)
    except (KeyError, TypeError, ValueError, AttributeError):
        console.print(f"'{folder / PROVENANCE}' was not written by this project, and is not shown", markup=False)
    if options.hash:
        hashes: dict[str, str] = {}
        for own in (True, False):  # hashes among one layout, and among several
            with suppress(UserError):  # some layouts only mix with themselves
                (stored,) = with_common_names([open_model(options.path)], own)
                hashes.setdefault(content_hash(stored), stored.kind)
        for digest, kind in hashes.items():
            console.print(f"xxh3_128 {digest} ({kind})", markup=False, highlight=False)
    return 0


def check_whole(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint holds all tensors of its model. A difference to a base does not.

    Raises:
        UserError: its tensors are not those of its model.
    """
    with torch.device("meta"):
        checkpoint.check(Sphinx(checkpoint.model_config))


def _export(checkpoint: Checkpoint, options: argparse.Namespace, console: Console) -> int:
    out = Path(options.out)
    check_whole(checkpoint)
    if options.shards < 1:
        raise UserError(f"--shards={options.shards} must be at least 1")
    if options.to == "huggingface":
        write_huggingface(checkpoint, out, options.family)
        name = exported_family(checkpoint, options.family).architecture
        console.print(f"{out}: the decoder, for {name}.from_pretrained", markup=False)
    else:
        kind = write_original(checkpoint, out, options.shards)
        console.print(f"{out}: {kind} in {options.shards} shards", markup=False)
        if checkpoint.processor.get("system", SYSTEM) != SYSTEM:
            console.print(
                "Note: it was trained with another system text than the original's, which cannot be changed there"
            )
    return 0


def import_checkpoint(checkpoint: Checkpoint, out: str, overwrite: bool) -> None:
    """Write `checkpoint` in our layout, one tensor at a time.

    Raises:
        UserError: its tensors are not those of its model, or `out` exists. Nothing is written then.
    """
    check_folder(Path(out), "out")
    check_free(Path(out), overwrite, [checkpoint.path])
    check_whole(checkpoint)
    tokenizer = checkpoint.tokenizer()
    check_room(Path(out), sum(checkpoint.info(name).nbytes for name in checkpoint))
    with ThreadPoolExecutor(1) as hashing:  # during the copy, so each byte is read once
        identity = hashing.submit(checkpoint.identity)
        write_checkpoint(
            out,
            checkpoint,
            checkpoint.model_config.to_dict(),
            checkpoint.processor,
            tokenizer,
            lambda: provenance("import", None, [identity.result()]),
            unused=checkpoint.unused(),
            overwrite=overwrite,
            progress="Importing",
        )


if __name__ == "__main__":
    sys.exit(main())
