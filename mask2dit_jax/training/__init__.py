"""A training run: its step, state, optimiser, checkpoints, metrics and validation."""
