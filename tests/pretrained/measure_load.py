"""Loads a checkpoint and prints what it cost: `measure_load.py FOLDER DTYPE`, run by test_weights.py."""

import json
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from mask2dit_jax.models.port_rules import LINEAR, Rule, flatten
from mask2dit_jax.pretrained.safetensors import load_state, open_weights

TABLE = (
    Rule("embed.weight", "embed"),
    Rule("blocks.{layer}.w.weight", "kernel", LINEAR),
    Rule("blocks.{layer}.w.bias", "bias"),
)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


class Peak(threading.Thread):
    """Watches the memory above what there was at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self._start, self._done, self.bytes = anonymous_bytes(), threading.Event(), 0

    def run(self):
        while not self._done.is_set():
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)
            time.sleep(0.001)

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self.bytes, anonymous_bytes() - self._start)


def abstract(weights) -> nnx.State:
    layers = sum(key.endswith("bias") for key in weights)
    outputs, inputs = weights["blocks.0.w.weight"].shape
    shapes = {"embed": weights["embed.weight"].shape, "kernel": (layers, inputs, outputs), "bias": (layers, outputs)}
    return nnx.State({name: nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32)) for name, shape in shapes.items()})


def shardings(state) -> nnx.State:
    """The kernels by columns, the embedding by rows, and the biases by layers."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"embed": ("x",), "kernel": (None, None, "x"), "bias": ("x",)}
    return nnx.State(
        {name: leaf.copy(NamedSharding(mesh, PartitionSpec(*specs[name]))) for name, leaf in flatten(state).items()}
    )


def equal(state, folder: Path) -> bool:
    """Compares one layer and some rows with what safetensors itself reads."""
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        kernel, embed = file.get_tensor("blocks.5.w.weight"), file.get_slice("embed.weight")[100:120]
    pairs = [(state["kernel"][...][5], kernel.T), (state["embed"][...][100:120], embed)]
    return all(np.array_equal(np.asarray(ours), theirs.astype(ours.dtype)) for ours, theirs in pairs)


def main(folder: Path, dtype: str):
    weights = open_weights(folder)
    state = abstract(weights)
    places = shardings(state) if jax.device_count() > 1 else None
    jnp.zeros(1).block_until_ready()  # what the backend itself needs is not the model's
    peak = Peak()
    peak.start()
    loaded = load_state(TABLE, weights, state, dtype=None if dtype == "None" else jnp.dtype(dtype), shardings=places)
    jax.block_until_ready(loaded)
    used = peak.stop()
    leaves = jax.tree.leaves(loaded)
    result = {
        "peak_bytes": used,
        "model_bytes": sum(leaf.nbytes for leaf in leaves),
        "shards": len(leaves[0].addressable_shards),
        "equal": equal(loaded, folder),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
