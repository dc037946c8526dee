"""Mix the weights of several checkpoints: the code is in sphinx_pl/cli/mix_weights.py."""

from sphinx_pl.cli.mix_weights import main

if __name__ == "__main__":
    main()
