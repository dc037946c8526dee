"""Runs a whole recipe as a chain of steps: `python -m sphinx_pl.cli.pipeline`. docs/pipeline.md
explains its use.
"""
