"""Golden cases of the authors' code. `MASK2DIT_FIXTURES=DIR` runs the same tests over another folder of cases."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mask2dit_jax.models import port_rules as port

FIXTURES = Path(os.environ.get("MASK2DIT_FIXTURES", Path(__file__).parents[1] / "fixtures"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder with `config.json` and the arrays of `data.npz`."""

    folder: Path

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "data.npz") as data:
            return dict(data)

    def weights(self, relative_path: str) -> dict[str, np.ndarray]:
        return load_file(self.folder / relative_path)

    def __str__(self):
        return self.folder.name


def cases(kind: str) -> list:
    """Return every case whose folder name starts with `kind`, as pytest parameters; our own fixtures must have one."""
    found = [Case(folder) for folder in sorted(FIXTURES.iterdir()) if folder.name.startswith(kind)]
    if not found and "MASK2DIT_FIXTURES" not in os.environ:
        raise FileNotFoundError(f"no case named {kind}* in {FIXTURES}")
    return [pytest.param(case, id=str(case)) for case in found]


def load(module_factory, table, tensors: dict[str, np.ndarray]):
    """Fill a module with torch tensors through a port table of the package."""
    abstract = nnx.eval_shape(module_factory)
    graph, state = nnx.split(abstract)
    targets = port.flatten(state)
    slots = port.plan(table, {key: value.shape for key, value in tensors.items()}, state)
    filled = {path: np.empty(leaf.shape, np.float32) for path, leaf in targets.items()}
    for key, slot in slots.items():
        filled[slot.path][slice(None) if slot.layer is None else slot.layer] = slot.transform.to_nnx(tensors[key])
    return nnx.merge(graph, port.unflatten({path: jnp.asarray(value) for path, value in filled.items()}, state))


def to_channels_last(x: np.ndarray) -> jax.Array:
    """Return latents of the reference's transformer, (b, f, c, h, w), as (b, f, h, w, c)."""
    return jnp.asarray(x.transpose(0, 1, 3, 4, 2))


def assert_close(actual, expected, tolerance: float):
    difference = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max()
    assert difference <= tolerance, f"largest difference {difference:.2e} > {tolerance:.0e}"
