"""`sphinx-data real --out data/real` makes data of real pictures and text from published packages."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from sphinx_pl.data.real_pictures.packages import PACKAGES
from sphinx_pl.data.real_pictures.writer import build, report
from sphinx_pl.utils.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Return exit code 0, or 2 after a line that names the mistake."""
    parser = argparse.ArgumentParser(prog="sphinx-data real", description=__doc__)
    parser.add_argument("--out", default="data/real", help="folder to fill (default: data/real)")
    parser.add_argument("--seed", type=int, default=0, help="same packages and seed, same bytes (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the composed pictures (default: 1.0)")
    parser.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="NAME=PLACE",
        help=f"a file, folder or URL in place of a download; names: {', '.join(PACKAGES)}",
    )
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        if options.scale <= 0:
            raise UserError(f"--scale={options.scale} must be positive")
        given = {}
        for text in options.package:
            name, separator, place = text.partition("=")
            if not (separator and place):
                raise UserError(f"--package {text}: write it as NAME=PLACE")
            given[name] = place
        manifest = build(
            options.out,
            options.seed,
            options.scale,
            given,
            lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(manifest))
    print(f"{len(manifest['files'])} files in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
