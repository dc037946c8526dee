"""What the waiting of OpenMP's threads costs on a CPU: training alone, beside a second run, beside other busy programs.

    python -m perf.threads
    python -m perf.threads experiment=demo stage=finetune --settings passive "one thread" --rounds 7 --limit 1200

Overrides are those of train.py. Each setting has two processes that train on the same micro-batches, with random
weights, whenever they are asked to; the settings take turns in every round, and medians of rounds are printed. After
`--limit` seconds it ends with what has been measured.
"""

from __future__ import annotations

import argparse
import itertools
import os
import select
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from perf.harness import console, parser, run_command, table
from sphinx_pl.utils.errors import UserError

OURS = "as the scripts choose"
SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "spins 30,000 times": {"GOMP_SPINCOUNT": "30000"},
    "spins 3,000 times": {"GOMP_SPINCOUNT": "3000"},
    "spins 1,000 times": {"GOMP_SPINCOUNT": "1000"},
    "spins 300 times": {"GOMP_SPINCOUNT": "300"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    OURS: {},
}
"""Environment of each setting. 300,000 is libgomp's own."""
FEW = ("libgomp's own", "passive", OURS)
"""The settings that are compared by default: each starts processes, on cores that are shared."""
SITUATIONS = ("alone", "beside a second run", "beside a busy program for each core")
BUSY = "while True: pass"
ROWS = 2
"""Rows of a micro-batch: few, so that a slow setting ends soon after its time."""


def work(overrides: Sequence[str]) -> None:
    """Train for as many seconds as each line of standard input says, and print tokens/s."""
    import torch

    from perf import step
    from sphinx_pl.runtime.ranks import share_cores
    from sphinx_pl.stages.optim import build_optimizer

    share_cores()
    options = argparse.Namespace(overrides=overrides, rows=ROWS, device="cpu", precision="fp32")
    bench = step.build(options)
    batches = [bench.datamodule.collator(micro_batch.rows) for micro_batch in bench.datamodule.planner().plan()]
    optimizer = build_optimizer(bench.model.part_parameters(), bench.optim)

    def train(seconds: float) -> float:
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            batch = next(turns)
            bench.loss(batch).backward()  # type: ignore[no-untyped-call]
            tokens += batch.counters["tokens"]
            optimizer.step()
            optimizer.zero_grad()
        return tokens / (time.perf_counter() - start)

    turns = itertools.cycle(batches)
    train(0)
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        print(train(float(line)), flush=True)


class Worker:
    """A process of `work` in an environment."""

    def __init__(self, setting: dict[str, str], overrides: Sequence[str]) -> None:
        others = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        environment = {key: value for key, value in os.environ.items() if key not in others} | setting
        command = [sys.executable, "-m", "perf.threads", "--work", *overrides]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def read(self, until: float) -> float:
        """The next number that the process prints.

        Args:
            until: by `time.monotonic`.

        Raises:
            TimeoutError: it has printed none by then.
            UserError: it has ended; its own message is above.
        """
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
            raise TimeoutError
        if not (line := self.process.stdout.readline()):
            raise UserError(f"a process that trains has ended with exit code {self.process.wait()}")
        return float(line)

    def begin(self, seconds: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()


def measure(
    settings: dict[str, dict[str, str]], overrides: Sequence[str], rounds: int, seconds: float, limit: float
) -> dict[tuple[str, str], list[float]]:
    """(setting, situation) -> tokens/s of each round; beside a second run, those of one of the two.

    After `limit` seconds there are fewer rounds, or none.

    Raises:
        UserError: a process does not train, for instance since its data is not there.
    """
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    until = time.monotonic() + limit
    with suppress(TimeoutError), ExitStack() as stack:
        pairs = {
            name: [stack.enter_context(Worker(one, overrides)) for _ in range(2)] for name, one in settings.items()
        }
        for worker in itertools.chain.from_iterable(pairs.values()):
            worker.read(until)
        for _ in range(rounds):
            for name, (one, two) in pairs.items():
                one.begin(seconds)
                rates[name, SITUATIONS[0]].append(one.read(until))
                one.begin(seconds)
                two.begin(seconds)
                rates[name, SITUATIONS[1]].append((one.read(until) + two.read(until)) / 2)
                with busy():
                    one.begin(seconds)
                    rates[name, SITUATIONS[2]].append(one.read(until))
    return rates


@contextmanager
def busy() -> Iterator[None]:
    """A program for each core that does nothing but keep it busy."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def print_table(options: argparse.Namespace) -> None:
    """Prints tokens/s of every setting in every situation."""
    if options.work:
        return work(options.overrides)
    before = os.getloadavg()[0]
    chosen = {name: SETTINGS[name] for name in options.settings}
    rates = measure(chosen, options.overrides, options.rounds, options.seconds, options.limit)
    rounds = min((len(rates[name, SITUATIONS[-1]]) for name in chosen), default=0)
    rows = []
    for name in chosen:
        measured = (rates[name, situation] for situation in SITUATIONS)
        rows.append([name, *(f"{statistics.median(values):,.0f}" if values else "–" for values in measured)])
    title = f"Tokens/s, medians of {rounds} rounds; {len(os.sched_getaffinity(0))} cores"
    caption = f"Processes that ran before the first round, by the load average: {before:.1f}"
    console().print(table(title, ("threads that wait", *SITUATIONS), rows, caption))
    if rounds < options.rounds:
        print(f"ended after {options.limit:g} s: --limit takes more")


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__, "model=..., stage=...")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--seconds", type=float, default=2.0, help="of training in each situation")
    command.add_argument("--settings", nargs="+", choices=SETTINGS, default=FEW)
    command.add_argument("--limit", type=float, default=300.0, help="seconds, after which it ends")
    command.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return run_command(command, print_table, arguments)


if __name__ == "__main__":
    sys.exit(main())
