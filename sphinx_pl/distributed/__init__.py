"""Training on many devices: how a model is sharded, and how its training checkpoints are written and read."""
