"""What each script reads of its configuration. A key that nothing reads is refused, with the nearest one that is.

Two kinds of things read keys: dataclasses (`sphinx_pl.utils.config.build`) and what Hydra instantiates, whose signature
says which keys it has. Imports of what is large happen inside the functions.
"""
