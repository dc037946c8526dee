"""What the waiting of OpenMP's threads costs on a CPU: training alone, beside a second run, beside other busy programs.

    python -m benchmarks.threads
    python -m benchmarks.threads experiment=demo stage=finetune --rounds 7 --seconds 4

Overrides are those of train.py. Each setting has two processes that train on the same micro-batches, with random
weights, whenever they are asked to; the settings take turns in every round, and medians of rounds are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console

from sphinx_pl.console import Table

OURS = "as the scripts choose"
SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "spins 30,000 times": {"GOMP_SPINCOUNT": "30000"},
    "spins 3,000 times": {"GOMP_SPINCOUNT": "3000"},
    "spins 300 times": {"GOMP_SPINCOUNT": "300"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    OURS: {},
}
"""Environment of each setting. 300,000 is what libgomp takes where nothing is said."""
SITUATIONS = ("alone", "beside a second run", "beside a busy program for each core")
BUSY = "while True: pass"


def work(overrides: Sequence[str]) -> None:
    """Train for as many seconds as each line of standard input says, and print tokens/s."""
    import torch

    from benchmarks import step
    from sphinx_pl.processes import share_cores
    from sphinx_pl.stages.optim import build_optimizer

    share_cores()
    options = argparse.Namespace(overrides=overrides, rows=None, device="cpu", precision="fp32")
    bench = step.build(options)
    batches = [bench.datamodule.collator(micro_batch.rows) for micro_batch in bench.datamodule.planner().plan()]
    optimizer = build_optimizer(bench.model.part_parameters(), bench.optim)

    def train(seconds: float) -> float:
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for batch in batches:
                bench.loss(batch).backward()  # type: ignore[no-untyped-call]
                tokens += batch.counters["tokens"]
            optimizer.step()
            optimizer.zero_grad()
        return tokens / (time.perf_counter() - start)

    train(0.1)
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        print(train(float(line)), flush=True)


class Worker:
    """A process of `work` in an environment."""

    def __init__(self, setting: dict[str, str], overrides: Sequence[str]) -> None:
        others = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        environment = {key: value for key, value in os.environ.items() if key not in others} | setting
        command = [sys.executable, "-m", "benchmarks.threads", "--work", *overrides]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def read(self) -> float:
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    def begin(self, seconds: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()


def measure(
    settings: dict[str, dict[str, str]], overrides: Sequence[str], rounds: int, seconds: float
) -> dict[tuple[str, str], list[float]]:
    """(setting, situation) -> tokens/s of each round; beside a second run, those of one of the two."""
    found = defaultdict(list)
    with ExitStack() as stack:
        pairs: dict[str, list[Worker]] = {}
        for name, setting in settings.items():
            pairs[name] = [stack.enter_context(Worker(setting, overrides)) for _ in range(2)]
            for worker in pairs[name]:
                worker.read()
        for _ in range(rounds):
            for name, (one, two) in pairs.items():
                one.begin(seconds)
                found[name, SITUATIONS[0]].append(one.read())
                one.begin(seconds)
                two.begin(seconds)
                found[name, SITUATIONS[1]].append((one.read() + two.read()) / 2)
                busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
                one.begin(seconds)
                found[name, SITUATIONS[2]].append(one.read())
                for process in busy:
                    process.kill()
                    process.wait()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py's configuration")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of training in each situation")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.overrides)
        return 0
    before = os.getloadavg()[0]
    chosen = {name: SETTINGS[name] for name in options.settings}
    found = measure(chosen, options.overrides, options.rounds, options.seconds)
    table = Table(
        title=f"Tokens/s, medians of {options.rounds} rounds; {len(os.sched_getaffinity(0))} cores",
        caption=f"Processes that ran before the first round, by the load average: {before:.1f}",
    )
    table.add_column("threads that wait")
    for situation in SITUATIONS:
        table.add_column(situation, justify="right")
    for name in chosen:
        table.add_row(name, *(f"{statistics.median(found[name, situation]):,.0f}" for situation in SITUATIONS))
    console = Console()
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
