"""Training on many devices: sharded models, and training checkpoints."""
