"""The sample world has small pictures, captions, texts and instructions in the real data sets'
formats.

`writer.build` makes everything from a seed (the command is `python -m sphinx_pl.cli.sample`). Two
domains, "real" and "synthetic", describe the same kind of scene in different pictures and different
language. See `scenes` and `language`.
"""
