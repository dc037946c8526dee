"""A plan as tables in the terminal and as a file (`train.py … plan=true`)."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from sphinx_pl.planning.gpus import find_gpu
from sphinx_pl.planning.plan import Plan, make_plan
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.files import write_whole


def tables(plan: Plan) -> list[Table]:
    """The plan as it is printed."""
    engine = plan.engine
    sharing = f"{engine.kind} on {engine.nodes} * {engine.per_node} ranks, {engine.precision}"
    device = plan.gpu if engine.gpu else "the CPU"
    memory = Table(
        title=f"{plan.model}, {sharing}, checkpointing {plan.checkpointing}: memory of a rank",
        caption=f"The peak falls on the phase: {plan.memory.phase}.",
    )
    memory.add_column("of")
    memory.add_column("GiB", justify="right")
    for kind, amount in plan.memory.lines.items():
        memory.add_row(_NAMES.get(kind, kind), f"{amount / 2**30:,.2f}")
    memory.add_section()
    memory.add_row("peak", f"{plan.memory.total / 2**30:,.2f}")
    if engine.gpu:
        memory.add_row(f"what a {device} has for it", f"{plan.gpu_bytes / 2**30:,.2f}")
    if plan.memory.host:
        memory.add_row("offloaded, in a node's CPU memory", f"{plan.memory.host / 2**30:,.2f}")
    work = Table(title="The run", show_header=False)
    work.add_column("of")
    work.add_column("", justify="right")
    work.add_column("", overflow="fold")
    epoch = plan.steps_per_epoch
    step_rows = plan.rows * plan.accumulate * engine.ranks
    measured = "measured" if plan.content.source == "measured" else "assumed"
    lines: list[tuple[str, str, str]] = [
        ("parameters", f"{plan.parameters / 1e9:,.2f} * 10^9", f"{plan.trained / 1e9:,.2f} * 10^9 of them train"),
        (
            "rows per micro-batch",
            f"{plan.rows}",
            (f"{plan.largest_rows} fit into a {device}" if plan.largest_rows else f"NOT ONE fits into a {device}")
            if engine.gpu
            else "",
        ),
        ("rows per step", f"{step_rows:,}", f"of {plan.row_length} positions; {plan.accumulate} micro-batches a rank"),
        ("tokens per step", f"{plan.tokens_per_step:,.0f}", measured),
        ("images per step", f"{plan.images_per_step:,.0f}", measured),
        ("steps", f"{plan.steps:,}", f"an epoch has {'an unknown number' if epoch is None else f'{epoch:,.0f}'}"),
        ("FLOPs per step", f"{plan.flops_per_step / 1e15:,.1f} * 10^15", "forward and backward, encoders counted"),
    ]
    if engine.gpu:
        days = f" ({plan.hours / 24:,.1f} days)" if plan.hours > 48 else ""
        lines += [
            (
                "seconds per step",
                f"{plan.seconds_per_step:,.3f}",
                f"at an MFU of {plan.mfu:.0%} of {find_gpu(plan.gpu).flops / 1e12:,.0f} TFLOP/s",
            ),
            ("hours", f"{plan.hours:,.1f}", f"of all steps{days}"),
            (
                "data",
                f"{plan.data_bytes_per_second / 1e6:,.1f} MB/s",
                f"all ranks, {plan.content.image_bytes / 1e3:,.0f} kB an image ({measured})",
            ),
        ]
    lines += [
        ("training checkpoint", f"{plan.checkpoint_bytes / 1e9:,.1f} GB", "weights and moments, frozen parts"),
        ("model", f"{plan.model_bytes / 1e9:,.1f} GB", "weights only, in bf16"),
    ]
    for line in lines:
        work.add_row(*line)
    if plan.content.source != "measured":
        work.caption = f"The data could not be read ({plan.content.source.removeprefix('assumed: ')})."
    return [memory, work]


_NAMES = {
    "master weights": "master weights, float32",
    "optimizer": "optimizer states",
    "weights, cast": "weights cast to bf16",
    "activations": "activations and their gradients",
    "logits": "logits and cross entropy",
    "buckets": "communication buckets",
}


def print_plan(cfg: DictConfig, choice: str = "", console: Console | None = None) -> Plan:
    """Make the plan, print it, and write it where `plan_for.out` says."""
    plan = make_plan(cfg, choice)
    console = console or Console()
    for table in tables(plan):
        console.print(table)
    if plan.engine.gpu and not plan.fits:
        console.print(f"[bold]This does not fit into a {plan.gpu}.[/bold] What would:", highlight=False)
        for way in plan.advice:
            console.print(f"  - {way}", highlight=False, soft_wrap=True)
    if out := cfg.plan_for.get("out"):
        write_whole(Path(out), json.dumps(plan.to_dict(), indent=2) + "\n")
    return plan
