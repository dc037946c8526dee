"""Runs a whole recipe as a chain of steps: `sphinx-pipeline`. docs/pipeline.md
explains its use."""
