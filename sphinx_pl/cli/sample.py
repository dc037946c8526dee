"""`python -m sphinx_pl.cli.sample --out data/sample` makes the sample data."""

from __future__ import annotations

import argparse
import sys

from sphinx_pl.data.sample_world.writer import MANIFEST, build
from sphinx_pl.utils.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Return exit code 0, or 2 after a line that names the mistake."""
    parser = argparse.ArgumentParser(prog="python -m sphinx_pl.cli.sample", description="Make the sample data.")
    parser.add_argument("--out", default="data/sample", help="folder to fill (default: data/sample)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of items (default: 1.0)")
    options = parser.parse_args(arguments)
    try:
        if options.scale <= 0:
            raise UserError(f"--scale={options.scale} must be positive")
        manifest = build(options.out, options.seed, options.scale)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for name, count in manifest["counts"].items():
        print(f"{count:7d}  {name}")
    print(f"{len(manifest['files']):7d}  files in {options.out}, listed in {MANIFEST}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
