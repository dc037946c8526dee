"""The sample world: small pictures, captions, texts and instructions in the formats of the real
data sets.

Everything is made from a seed by `writer.build` (command: `python -m sphinx_pl.cli.sample`). Two
domains, "real" and "synthetic", describe the same kind of scene in different pictures and different
language; see `scenes` and `captions`.
"""
