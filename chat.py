"""Talk to a model in the terminal or in the browser: the code is in sphinx_pl/cli/chat.py."""

from sphinx_pl.cli.chat import main

if __name__ == "__main__":
    main()
