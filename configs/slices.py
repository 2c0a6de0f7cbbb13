"""What a slice of TPUs needs besides the mesh that is chosen for it: `configs/sft.py:5b,v5p-8`.

A mesh is chosen from the number of chips and the batch (parallel/mesh.py). Named here is what does not fit that way, or
would leave chips idle. Every slice was compiled for; docs/tpu.md has the figures. A batch other than the paper's 8 is
another recipe: with a smaller one, train longer.
"""

from collections.abc import Mapping
from typing import Any

SLICES = ("v5e-16", "v5e-64", "v5e-256", "v5p-8", "v5p-32", "v5p-128", "v6e-64")

# (slice, preset): what the training configs change.
TRAINING = {
    ("v5e-16", "2b"): {"global_batch_size": 4},
    ("v5e-16", "5b"): {"global_batch_size": 2, "remat": "full"},
    ("v5e-256", "2b"): {"global_batch_size": 16},
    ("v5e-256", "5b"): {"global_batch_size": 16},
    ("v5p-8", "5b"): {"global_batch_size": 4, "remat": "full"},
}

# What the sampling configs change. With 15 heads a chip after the exchange over `context`, the compiler for v6e
# (libtpu 0.0.42) ends with a segmentation fault; with the heads over `tensor` it does not.
SAMPLING = {("v6e-64", "2b"): {"mesh.context": 1, "mesh.tensor": 2}}


def changes(slice_name: str, preset: str) -> Mapping[str, Mapping[str, Any]]:
    """Return what a slice changes, for "train" and for "sample"; nothing without a slice."""
    if slice_name and slice_name not in SLICES:
        raise ValueError(f"slice {slice_name!r} has no settings; choose one of {', '.join(SLICES)}, or name none")
    key = slice_name, preset
    return {"train": TRAINING.get(key, {}), "sample": SAMPLING.get(key, {})}
