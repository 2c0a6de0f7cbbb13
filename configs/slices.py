"""What a slice of TPUs needs besides the mesh that is chosen for it: `configs/sft.py:5b,v5p-8`.

A mesh is chosen from the number of chips and the batch (parallel/mesh.py). Named here is what does not fit that way, or
would leave chips idle. What was compiled for its slice has its figures in docs/tpu.md. A batch other than the paper's 8
is another recipe: train longer with a smaller one.
"""

SLICES = ("v5e-16", "v5e-64", "v5e-256", "v5p-8", "v5p-32", "v5p-128", "v6e-64")

# (slice, size): fields of the training configs.
TRAINING = {
    ("v5e-16", "2b"): {"global_batch_size": 4},
    ("v5e-16", "5b"): {"global_batch_size": 2, "remat": "full"},
    ("v5e-256", "2b"): {"global_batch_size": 16},
    ("v5e-256", "5b"): {"global_batch_size": 16},
    ("v5p-8", "5b"): {"global_batch_size": 4, "remat": "full"},
}


def adapted(config, slice_name: str):
    """The config with what its slice needs; without a slice, as it is."""
    if slice_name and slice_name not in SLICES:
        raise ValueError(f"slice {slice_name!r} has no settings; choose one of {', '.join(SLICES)}, or name none")
    if "num_steps" in config:
        config.update(TRAINING.get((slice_name, config.preset), {}))
    return config
