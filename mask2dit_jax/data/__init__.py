"""From data files to batches, in NumPy alone: no module here imports JAX."""
