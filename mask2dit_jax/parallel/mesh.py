"""The device mesh and its axes. Programs run under `jax.set_mesh(make_mesh(...))`.

data     shards samples and replicates parameters; lies between slices (DCN), where bandwidth is low
fsdp     shards samples and parameters
context  shards the tokens of a sample, and parameters too, so that no chip stores a redundant copy
tensor   shards heads and the hidden units of feed-forward layers
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mask2dit_jax.errors import UserError

DATA, FSDP, CONTEXT, TENSOR = AXES = ("data", "fsdp", "context", "tensor")
BATCH = (DATA, FSDP)  # shard the samples
WEIGHTS = (FSDP, CONTEXT)  # shard the large axis of a parameter


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None, batch_size: int = 1
) -> Mesh:
    """Build a mesh of all devices, in which neighbours are neighbours on the chips' torus.

    Args:
        sizes: Number of devices along each axis. `choose_sizes` chooses a size that is 0 or absent.
        devices: Devices of the mesh. Defaults to all devices of this machine or pod; to compile for a topology, pass
            the topology's devices.
        batch_size: Samples per step on all devices together. It affects only the chosen sizes.

    Raises:
        UserError: The sizes do not multiply to the number of devices, or data does not divide over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    num_slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    shape = choose_sizes(dict(sizes or {}), len(devices), num_slices, batch_size)
    if shape[DATA] % num_slices:
        raise UserError(f"mesh.data={shape[DATA]} does not split over {num_slices} slices; use a multiple of it")
    per_slice = [size // num_slices if axis == DATA else size for axis, size in shape.items()]
    if num_slices > 1:
        between = [num_slices if axis == DATA else 1 for axis in shape]
        array = mesh_utils.create_hybrid_device_mesh(per_slice, between, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(per_slice, devices, allow_split_physical_axes=True)
    else:
        array = np.asarray(devices).reshape(per_slice)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh(tiles: tuple[int, int] = (1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build a mesh of this process's devices, for work that it does without the other processes.

    Args:
        tiles: Rows and columns of an image. As many devices as divide them share the rows (context) and the columns
            (tensor). The remaining devices only shard parameters (fsdp).
        devices: Devices of the mesh, by default all local ones; to compile for a topology, pass the topology's devices.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    rows = math.gcd(len(devices), tiles[0])
    columns = math.gcd(len(devices) // rows, tiles[1])
    return make_mesh({DATA: 1, CONTEXT: rows, TENSOR: columns, FSDP: len(devices) // (rows * columns)}, devices)


def choose_sizes(sizes: dict[str, int], num_devices: int, num_slices: int, batch_size: int) -> dict[str, int]:
    """Choose the sizes that are 0: data = number of slices, then fsdp as the samples allow, and context for the rest.

    Each chip thus has whole samples as long as there are enough of them, and parameters are sharded over all chips.

    Args:
        sizes: Number of devices along each axis, 0 or absent to be chosen.
        num_devices: Number of devices in all slices.
        num_slices: Number of slices.
        batch_size: Samples per step on all devices together.

    Raises:
        UserError: An axis does not exist, a size is negative, or the sizes do not multiply to `num_devices`.
    """
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise UserError(f"a mesh has no axis {sorted(unknown)[0]!r}; use {', '.join(AXES)}")
    chosen = dict.fromkeys(AXES, 0) | sizes
    if min(chosen.values()) < 0:
        raise UserError(f"mesh {_text(chosen)}: a size must be at least 1, or 0 to be chosen automatically")
    chosen[DATA] = chosen[DATA] or num_slices
    chosen[TENSOR] = chosen[TENSOR] or 1

    def left() -> int:
        return num_devices // math.prod(size for size in chosen.values() if size)

    chosen[FSDP] = chosen[FSDP] or max(1, math.gcd(left(), batch_size // chosen[DATA] or 1))
    chosen[CONTEXT] = chosen[CONTEXT] or max(1, left())
    if math.prod(chosen.values()) != num_devices:
        raise UserError(
            f"mesh {_text(chosen)} does not fit {num_devices} devices; set --config.mesh.AXIS so that it does"
        )
    return chosen


def sizes_for_any_length(
    sizes: dict[str, int], num_devices: int, batch_size: int, parts: Sequence[int], num_heads: int
) -> dict[str, int]:
    """Choose sizes for samples whose scenes may have any length.

    Like `choose_sizes`, but context only shards tokens as far as always divides; tensor takes the remaining devices.

    Args:
        sizes: Number of devices along each axis, 0 or absent to be chosen.
        num_devices: Number of devices.
        batch_size: Samples per step on all devices together.
        parts: Numbers of tokens that samples consist of, such as those of a text and of a latent frame.
        num_heads: Number of attention heads, which tensor shards.
    """
    chosen = choose_sizes(sizes, num_devices, 1, batch_size)
    if sizes.get(CONTEXT) or sizes.get(TENSOR):
        return chosen
    tensor = math.gcd(chosen[CONTEXT] // math.gcd(chosen[CONTEXT], *parts), num_heads)
    return chosen | {CONTEXT: chosen[CONTEXT] // tensor, TENSOR: tensor}


def describe_mesh(mesh: Mesh) -> str:
    """Return what a mesh consists of and how it is divided, such as "8 x TPU v5p, mesh fsdp=4, context=2"."""
    kind = mesh.devices.flat[0].device_kind
    processes = len({device.process_index for device in mesh.devices.flat})
    where = f" of {processes} processes" if processes > 1 else ""
    divided = {axis: size for axis, size in mesh.shape.items() if size > 1}
    return f"{mesh.size} x {kind}{where}" + (f", mesh {_text(divided)}" if divided else "")


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def check_batch(batch_size: int, mesh: Mesh, num_parts: int = 1) -> None:
    """Check that each of `num_parts` parts of the batch divides over the devices.

    Raises:
        UserError: It does not.
    """
    shares = mesh.shape[BATCH[0]] * mesh.shape[BATCH[1]]
    if batch_size % num_parts:
        raise UserError(f"global_batch_size={batch_size} is not a multiple of accumulate_steps={num_parts}")
    if batch_size // num_parts % shares:
        parts = f" / accumulate_steps={num_parts}" if num_parts > 1 else ""
        raise UserError(
            f"global_batch_size={batch_size}{parts} does not divide over mesh.data x mesh.fsdp = {shares}; use a "
            f"multiple of {shares * num_parts}, or give more of the devices to mesh.context"
        )


def check_tokens(num_tokens: int, mesh: Mesh) -> None:
    """Check that the tokens of a sample divide over context.

    Raises:
        UserError: They do not.
    """
    shares = mesh.shape[CONTEXT]
    if num_tokens % shares:
        raise UserError(
            f"the {num_tokens} tokens of a sample do not divide over mesh.context={shares}; lower mesh.context and "
            "raise mesh.tensor instead, or change num_scenes, num_frames or the size so that they do"
        )


def platform() -> str:
    """Return the platform that the program is compiled for, such as "tpu".

    It is that of the current mesh, which may consist of a topology's devices, or JAX's default without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform
