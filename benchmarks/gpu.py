"""Trains real models at real shapes on one GPU under ZeRO-3: tokens/s, MFU, memory beside the plan's.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --models sphinx_7b --steps 50 data.packing.micro_batch_rows=2
    python -m benchmarks.gpu --models sphinx_sample --steps 5 trainer=zero3_cpu trainer.devices=1    # without a GPU

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
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table

from benchmarks.memory import Measured, measure, plan_of
from sphinx_pl.callbacks.throughput import peak_flops
from sphinx_pl.planning.gpus import name_of_device
from sphinx_pl.planning.plan import Plan
from sphinx_pl.runtime.hydra_app import report
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
            "no GPU is here; to try the command without one: python -m benchmarks.gpu --models sphinx_sample --steps 5 "
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


def row(found: Measured, states: str, peak: float) -> list[str]:
    """Of the table. The first steps warm up: times are medians of the second half."""
    plan = found.plan
    seconds = statistics.median(found.seconds[len(found.seconds) // 2 :])
    return [
        plan.model,
        states,
        plan.checkpointing,
        f"{plan.rows} * {plan.row_length}",
        f"{plan.images_per_step:.0f}",
        f"{len(found.seconds)}",
        f"{seconds:.3f}",
        f"{plan.rows * plan.row_length * plan.accumulate / seconds:,.0f}",
        f"{plan.flops_per_step / seconds / peak:.1%}",
        f"{found.peak / 2**30:.2f}",
        f"{found.ratio:.3f}",
        f"{found.losses[0]:.3f} to {found.losses[-1]:.3f}",
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py's configuration")
    parser.add_argument("--models", default=MODELS, metavar="MODEL,...", help="of conf/model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_intermixed_args(arguments)
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        console = Console()
        console = console if console.is_terminal else Console(width=200)
        for model in options.models.split(","):
            overrides, states, plan = choose(model, options.overrides)
            found = measure(overrides, steps=options.steps, plan=plan)
            bf16 = plan.engine.precision.startswith("bf16")
            # A table for each, at once: the next model may fail, or the machine's time be over.
            table = Table(title=torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread")
            for column in COLUMNS:
                table.add_column(column, justify="right")
            table.add_row(*row(found, states, peak_flops(device, torch.bfloat16 if bf16 else torch.float32)))
            console.print(table)
    except (UserError, HydraException) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
