"""Training on many devices: how a model is sharded, and how training checkpoints are written and
read.
"""
