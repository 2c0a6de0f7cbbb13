"""Where parameters, optimiser state, batches and activations lie on the mesh.

Every model has a table of rows (pattern of parameter paths, partition of the axes), and every parameter matches exactly
one row. What derives from parameters, such as Adam's moments and moving averages, has paths that end in theirs, so it
matches the same rows.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mask2dit_jax.axes import Array
from mask2dit_jax.parallel.mesh import BATCH, CONTEXT, TENSOR, WEIGHTS

P = PartitionSpec
Table = Sequence[tuple[str, PartitionSpec]]
ALL = (*WEIGHTS, TENSOR)  # for parameters with no axis of heads or hidden units

# Partitions of activations, at the points where models constrain them.
TOKENS = P(BATCH, CONTEXT)  # (b l d), and (b l anything)
HEADS = P(BATCH, CONTEXT, TENSOR)  # (b l k m)
HIDDEN = P(BATCH, CONTEXT, TENSOR)  # (b l f)
SAMPLES = P(BATCH)  # (b ...)
FRAMES = P(BATCH, None, CONTEXT, TENSOR)  # (b f h w c): frames of a VAE, cut into tiles


def spec_of(path: str, table: Table) -> PartitionSpec:
    """Return the partition of one parameter.

    Raises:
        ValueError: no row of the table matches, or several do.
    """
    rows = [spec for pattern, spec in table if re.fullmatch(pattern, path)]
    if len(rows) != 1:
        raise ValueError(f"parameter {path} matches {len(rows)} rows of the sharding table, not one")
    return rows[0]


def fit(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return `spec` without the mesh axes that do not divide the array, as happens with small models."""
    return P(*(_dividing(entry, size, mesh) for entry, size in zip(spec, shape, strict=False)))


def _dividing(entry, size: int, mesh) -> tuple[str, ...] | None:
    kept = []
    for axis in (entry,) if isinstance(entry, str) else entry or ():
        if size % mesh.shape[axis] == 0:
            kept.append(axis)
            size //= mesh.shape[axis]
    return tuple(kept) or None


def parameter_shardings(params, mesh: Mesh, table: Table):
    """Return the sharding of every leaf of a parameter state, concrete or abstract, or of anything that mirrors one.

    Scalars, such as counters and keys, are replicated.
    """

    def place(path: Sequence[Any], leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, fit(spec_of(name_of(path), table), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def name_of(path) -> str:
    """Return the path of a parameter, without what holds it (`opt_state[1].mu`) and the variable's `.value`."""
    keys = [getattr(entry, "key", None) for entry in path]
    return ".".join(str(key) for key in keys if isinstance(key, str))


def constrain(x: Array, spec: PartitionSpec) -> Array:
    """Constrain where an activation lies on the mesh of `jax.set_mesh`; without a mesh, return `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fit(spec, x.shape, mesh))


def placed(abstract, shardings):
    """Return shapes and dtypes together with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds in full."""
    return NamedSharding(mesh, P())
