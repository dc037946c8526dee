"""Train one stage of the recipe: the code is in sphinx_pl/cli/train.py."""

from sphinx_pl.cli.train import main

if __name__ == "__main__":
    main()
