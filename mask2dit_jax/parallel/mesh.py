"""The device mesh. Programs run under `jax.set_mesh(make_mesh(...))`; whoever places an array names these axes.

data     samples, parameters replicated: the axis between slices (DCN), where little may be exchanged
fsdp     samples, parameters sharded
context  tokens of one sample; parameters are sharded over it as well, so that no chip idles with a copy
tensor   heads, and hidden units of the feed-forward layers
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mask2dit_jax.errors import UserError

DATA, FSDP, CONTEXT, TENSOR = AXES = ("data", "fsdp", "context", "tensor")
BATCH = (DATA, FSDP)  # samples
WEIGHTS = (FSDP, CONTEXT)  # the large axis of a parameter


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None, batch_size: int = 1
) -> Mesh:
    """A mesh of all devices, neighbours on it being neighbours on the chips' torus.

    Args:
        sizes: devices along each axis. 0 (or an absent axis) leaves the choice to `choose_sizes`.
        devices: of this machine or pod if not given; those of a topology to compile for it.
        batch_size: samples of a step, all devices together; only the choice of sizes depends on it.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or data does not split over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    num_slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    shape = choose_sizes(dict(sizes or {}), len(devices), num_slices, batch_size)
    if shape[DATA] % num_slices:
        raise UserError(f"mesh.data={shape[DATA]} does not split over {num_slices} slices; use a multiple of that")
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
    """A mesh of this process's devices, for what it computes by itself.

    Args:
        tiles: rows and columns of an image; as many devices as divide them take a band of rows each (context), and of
            columns (tensor). The others are there for parameters alone (fsdp).
        devices: those of a topology to compile for it.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    rows = math.gcd(len(devices), tiles[0])
    columns = math.gcd(len(devices) // rows, tiles[1])
    return make_mesh({DATA: 1, CONTEXT: rows, TENSOR: columns, FSDP: len(devices) // (rows * columns)}, devices)


def choose_sizes(sizes: dict[str, int], num_devices: int, num_slices: int, batch_size: int) -> dict[str, int]:
    """Fills in the sizes that are 0: a slice is one step along data, samples go over fsdp, what is left over context.

    So each chip has whole samples as long as there are enough of them, and parameters are sharded over all chips.
    """
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise UserError(f"a mesh has no axis {sorted(unknown)[0]!r}; its axes are {', '.join(AXES)}")
    chosen = dict.fromkeys(AXES, 0) | sizes
    if min(chosen.values()) < 0:
        raise UserError(f"mesh {_text(chosen)}: a size is at least 1, or 0, which leaves it to be chosen")
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
    """As `choose_sizes`, for samples whose scenes may have any length: tokens are split no further than always works.

    Args:
        parts: tokens that samples are made of, such as those of a text and of a latent frame.
        num_heads: they take the devices that tokens cannot.
    """
    chosen = choose_sizes(sizes, num_devices, 1, batch_size)
    if sizes.get(CONTEXT) or sizes.get(TENSOR):
        return chosen
    tensor = math.gcd(chosen[CONTEXT] // math.gcd(chosen[CONTEXT], *parts), num_heads)
    return chosen | {CONTEXT: chosen[CONTEXT] // tensor, TENSOR: tensor}


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def check_batch(batch_size: int, mesh: Mesh, num_parts: int = 1) -> None:
    """Each of `num_parts` parts of the batch must divide over the devices."""
    shares = mesh.shape[BATCH[0]] * mesh.shape[BATCH[1]]
    if batch_size % num_parts:
        raise UserError(f"global_batch_size={batch_size} is no multiple of accumulate_steps={num_parts}")
    if batch_size // num_parts % shares:
        parts = f" / accumulate_steps={num_parts}" if num_parts > 1 else ""
        raise UserError(
            f"global_batch_size={batch_size}{parts} does not divide over mesh.data x mesh.fsdp = {shares}; use a "
            f"multiple of {shares * num_parts}, or give mesh.context more of the devices"
        )


def check_tokens(num_tokens: int, mesh: Mesh) -> None:
    shares = mesh.shape[CONTEXT]
    if num_tokens % shares:
        raise UserError(
            f"the {num_tokens} tokens of a sample do not divide over mesh.context={shares}; lower mesh.context and "
            "raise mesh.tensor instead, or change num_scenes, num_frames or the size so that they do"
        )


def platform() -> str:
    """What the program is compiled for: the mesh's devices, which may be those of a topology, else the default."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform
