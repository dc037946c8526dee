"""The keys that each script reads of its configuration.

Other keys are refused, with the nearest known key.

Two kinds of objects read keys: dataclasses (`sphinx_pl.utils.config.build`), and objects that Hydra
instantiates, whose signatures define their keys. Functions import large libraries only when they
need them.
"""
