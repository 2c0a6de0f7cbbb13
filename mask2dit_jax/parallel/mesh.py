"""The device mesh, and how a batch and a state lie on it: data parallel, the state replicated."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mask2dit_jax.errors import UserError

DATA = "data"


def make_mesh() -> Mesh:
    """All devices of all processes, along one axis of samples."""
    return Mesh(np.asarray(jax.devices()), (DATA,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_sample(mesh: Mesh) -> NamedSharding:
    """The leading (batch) axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_batch_size(global_batch_size: int, mesh: Mesh) -> int:
    if global_batch_size < 1 or global_batch_size % mesh.size:
        raise UserError(
            f"global_batch_size {global_batch_size} does not divide over {mesh.size} devices; "
            f"use a multiple of {mesh.size}"
        )
    return global_batch_size


def global_batch(batch, mesh: Mesh):
    """Puts each process's share of a batch (NumPy arrays, leading axis its samples) together to global arrays."""
    sharding = by_sample(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
