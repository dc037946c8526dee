"""Trains real models at real shapes on one GPU under ZeRO-3: tokens/s, MFU, memory beside the plan's.

    python -m perf.gpu
    python -m perf.gpu --models sphinx_7b --steps 50 data.packing.micro_batch_rows=2
    python -m perf.gpu --models sphinx_sample --steps 5 trainer=zero3_cpu trainer.devices=1    # without a GPU

Weights are new, and every step has the same random batch, in which a model can only learn which tokens there are: time
and memory depend on neither. A model that does not fit with float32 masters and moments trains with both in bf16,
which the table says. Overrides are train.py's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch

from perf.harness import console, parser, run_command, table, where
from perf.memory import Measured, measure, plan_of
from sphinx_pl.callbacks.throughput import peak_flops
from sphinx_pl.planning.gpus import name_of_device
from sphinx_pl.planning.plan import Plan
from sphinx_pl.utils.errors import UserError

MODELS = "sphinx_7b,sphinx_13b"
STEP = (
    "experiment=paper_pretrain_real",
    "trainer=zero3",
    "trainer.devices=1",
    "data.packing.micro_batch_rows=1",
    "stage.accumulate=1",
    "stage.checkpointing=full",
    # Of one rank the frozen part would be there twice.
    "trainer.strategy.frozen=sharded",
    "+trainer.strategy.zero.reduce_bucket_size=100000000",
    "data.root=nowhere",
)
LEAN = ("trainer.strategy.masters=bf16", "trainer.strategy.reduce_dtype=bf16", "stage.optim.moments=bf16")


def choose(model: str, more: Sequence[str]) -> tuple[list[str], str, Plan]:
    """Overrides for train.py, what the optimizer's numbers are, and the plan.

    Raises:
        UserError: there is no GPU, or it is too small.
    """
    cpu = "trainer=zero3_cpu" in more
    chosen = [o for o in STEP if not any(m.partition("=")[0] == o.partition("=")[0] for m in more)]
    overrides = [*chosen, f"model={model}", *more]
    if cpu:
        return overrides, "fp32", plan_of(overrides)
    if not torch.cuda.is_available():
        raise UserError(
            "no GPU is here; to try the command without one: python -m perf.gpu --models sphinx_sample --steps 5 "
            "trainer=zero3_cpu trainer.devices=1"
        )
    device = torch.cuda.get_device_name()
    if (gpu := name_of_device(device)) is None:
        raise UserError(f"{device} is not among the GPUs in sphinx_pl/planning/gpus.py: add its line there")
    overrides.append(f"plan_for.gpu={gpu}")
    for precision, extra in (("fp32", ()), ("bf16", LEAN)):
        plan = plan_of([*overrides, *extra])
        if plan.fits:
            return [*overrides, *extra], precision, plan
    raise UserError(
        f"{model} needs {plan.memory.total / 2**30:.1f} GiB, and a {gpu} has {plan.gpu_bytes / 2**30:.1f} for it: "
        "choose a smaller model (--models)"
    )


def row(run: Measured, states: str, peak: float) -> list[str]:
    """The table's row of a run. The first steps warm up: times are medians of the second half."""
    plan = run.plan
    seconds = statistics.median(run.seconds[len(run.seconds) // 2 :])
    return [
        plan.model,
        states,
        plan.checkpointing,
        f"{plan.rows} * {plan.row_length}",
        f"{plan.images_per_step:.0f}",
        f"{len(run.seconds)}",
        f"{seconds:.3f}",
        f"{plan.rows * plan.row_length * plan.accumulate / seconds:,.0f}",
        f"{plan.flops_per_step / seconds / peak:.1%}",
        f"{run.peak / 2**30:.2f}",
        f"{run.ratio:.3f}",
        f"{run.losses[0]:.3f} to {run.losses[-1]:.3f}",
    ]


COLUMNS = (
    "model",
    "masters, moments",
    "recomputed",
    "positions",
    "images",
    "steps",
    "s/step",
    "tokens/s",
    "MFU",
    "peak GiB",
    "planned / peak",
    "loss",
)


def print_tables(options: argparse.Namespace) -> None:
    """Trains every model and prints its table at once: the next may fail, or the machine's time be over."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in options.models.split(","):
        overrides, states, plan = choose(model, options.overrides)
        run = measure(overrides, steps=options.steps, plan=plan)
        bf16 = plan.engine.precision.startswith("bf16")
        peak = peak_flops(device, torch.bfloat16 if bf16 else torch.float32)
        console().print(table(where(device), COLUMNS, [row(run, states, peak)]))


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__, "what differs from a step of the paper's pretraining")
    command.add_argument("--models", default=MODELS, metavar="MODEL,...", help="of conf/model")
    command.add_argument("--steps", type=int, default=20)
    return run_command(command, print_tables, arguments)


if __name__ == "__main__":
    sys.exit(main())
