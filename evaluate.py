"""Evaluate a checkpoint on the task suite and on benchmarks: the code is in sphinx_pl/cli/evaluate.py."""

from sphinx_pl.cli.evaluate import main

if __name__ == "__main__":
    main()
