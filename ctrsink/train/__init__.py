"""The training loop, its stages, DeepSpeed engine and checkpoints."""
