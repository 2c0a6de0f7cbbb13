"""The TPU chips that this project compiles for, and slices of them by name, such as "v5p:4x4x4" or "v5p-128".

Nothing here needs a TPU. The devices of a slice come from the TPU compiler's description of the topology.
"""

import dataclasses
import functools
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from mask2dit_jax.errors import UserError

_GB = 1e9


@dataclass(frozen=True)
class Chip:
    """The figures of one chip, which JAX calls a device (both cores of a v4 or v5p).

    Attributes:
        name: Name such as "v5e".
        peak_flops: bf16 FLOP/s.
        hbm_gib: GiB that the compiler lets a program use, which is less than the data sheet states.
        hbm_bandwidth: Bytes/s.
        ici_link_bandwidth: Bytes/s over one link in one direction. A chip has two links per torus dimension.
        torus_dims: Number of dimensions of the torus.
        wrap_multiple: A torus dimension closes to a ring if its size is a multiple of this.
        mxu_width: Side of the square matrix unit.
        vmem_mib: MiB of VMEM of one core.
        dcn_host_bandwidth: Bytes/s of a host's network cards, which its chips share.
        chips_per_host: Number of chips of a host.
        largest_slice: Number of chips of the largest slice.
        cores_in_name: Cores that a product name counts per chip: "v5p-8" counts TensorCores, two per chip, and "v5e-16"
            counts chips.
    """

    name: str
    peak_flops: float
    hbm_gib: float
    hbm_bandwidth: float
    ici_link_bandwidth: float
    torus_dims: int
    wrap_multiple: int
    mxu_width: int
    vmem_mib: int
    dcn_host_bandwidth: float
    chips_per_host: int
    largest_slice: int
    cores_in_name: int

    @property
    def hbm_bytes(self) -> float:
        """Bytes of HBM that the compiler lets a program use."""
        return self.hbm_gib * 2**30


# Sources of the figures:
# Peak, HBM, ICI, hosts, sizes: "System architecture" in https://cloud.google.com/tpu/docs/v5e (and v4, v5p, v6e).
# These pages state ICI per chip, for both directions of all links: 400 (v5e), 800 (v6e) and 1200 GB/s (v5p) over 4, 4
# and 6 links, hence 50, 100 and 100 GB/s per link and direction. https://jax-ml.github.io/scaling-book/tpus gives the
# same figures, 45 GB/s for v4, and the rule for rings: v5e and v6e close only dimensions of 16 chips, v4 and v5p those
# of slices made of whole 4x4x4 cubes.
# hbm_gib: the "available HBM" that the TPU compiler (libtpu 0.0.42) reports when it refuses a program.
# mxu_width, vmem_mib: JAX's table for Pallas kernels (jax/_src/pallas/mosaic/tpu_info.py, jax 0.10).
# Network: v5p 50 Gbit/s per chip with 4 chips per host, v4 assumed equal; v5e 2 x 100 and v6e 4 x 200 Gbit/s for 8
# chips.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            peak_flops=275e12,
            hbm_gib=30.75,
            hbm_bandwidth=1200 * _GB,
            ici_link_bandwidth=45 * _GB,
            torus_dims=3,
            wrap_multiple=4,
            mxu_width=128,
            vmem_mib=16,
            dcn_host_bandwidth=25 * _GB,
            chips_per_host=4,
            largest_slice=4096,
            cores_in_name=2,
        ),
        Chip(
            name="v5e",
            peak_flops=197e12,
            hbm_gib=15.75,
            hbm_bandwidth=819 * _GB,
            ici_link_bandwidth=50 * _GB,
            torus_dims=2,
            wrap_multiple=16,
            mxu_width=128,
            vmem_mib=128,
            dcn_host_bandwidth=25 * _GB,
            chips_per_host=8,
            largest_slice=256,
            cores_in_name=1,
        ),
        Chip(
            name="v5p",
            peak_flops=459e12,
            hbm_gib=95.74,
            hbm_bandwidth=2765 * _GB,
            ici_link_bandwidth=100 * _GB,
            torus_dims=3,
            wrap_multiple=4,
            mxu_width=128,
            vmem_mib=64,
            dcn_host_bandwidth=25 * _GB,
            chips_per_host=4,
            largest_slice=6144,
            cores_in_name=2,
        ),
        Chip(
            name="v6e",
            peak_flops=918e12,
            hbm_gib=31.25,
            hbm_bandwidth=1640 * _GB,
            ici_link_bandwidth=100 * _GB,
            torus_dims=2,
            wrap_multiple=16,
            mxu_width=256,
            vmem_mib=128,
            dcn_host_bandwidth=100 * _GB,
            chips_per_host=8,
            largest_slice=256,
            cores_in_name=1,
        ),
    )
}

# JAX's names (`device_kind`).
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def chip_of(device: jax.Device) -> Chip | None:
    """Return the chip of a device, or None if CHIPS does not list it (a CPU, for example)."""
    return CHIPS.get(_KINDS.get(device.device_kind, ""))


# Shapes of the usual slices by their number of chips ("Configurations" tables of the same pages).
_FLAT_SHAPES = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBIC_SHAPES = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """A slice, or several equal slices connected by the data center network (DCN).

    Attributes:
        chip: Kind of chip.
        shape: Chips along each dimension of a slice's torus.
        num_slices: Number of slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def torus(self) -> str:
        """Name of one slice as the TPU compiler takes it, such as "v5e:8x8"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """Name of the slice, preceded by the number of slices if there are several."""
        return self.torus if self.num_slices == 1 else f"{self.num_slices} x {self.torus}"

    @property
    def num_chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.shape) * self.num_slices

    def host(self) -> "Topology":
        """Return the topology of one host: all chips if one host holds them (8 of v5e or v6e at most), otherwise 4."""
        if self.num_chips <= self.chip.chips_per_host:
            return dataclasses.replace(self, num_slices=1)
        return Topology(self.chip, (2, 2, 1)[: self.chip.torus_dims])

    def wraps(self, dim: int) -> bool:
        """Return whether torus dimension `dim` is a ring. Otherwise it is a line."""
        cubes_only = self.chip.torus_dims == 3
        sizes = self.shape if cubes_only else (self.shape[dim],)
        return all(size % self.chip.wrap_multiple == 0 for size in sizes)

    def devices(self) -> list:
        """Return the devices of all slices, for a mesh to compile for. They cannot run anything.

        Raises:
            UserError: The TPU compiler is not installed or does not know the topology.
        """
        return list(_devices(self))


@functools.cache
def _devices(topology: Topology) -> tuple:
    prepare_compiler()
    options = {}
    if topology.chip.name == "v4":  # otherwise each of its two cores is a device
        options["chip_config_name"] = "megacore"
    if any(size % 2 for size in topology.shape[:2]):  # libtpu assumes hosts of 2x2 chips
        options["chips_per_host_bounds"] = [1, 1, 1]
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology.torus, **options).devices)
    except RuntimeError as error:
        raise UserError(f"cannot compile for {topology.name}: {error}; check that jax[tpu] is installed") from error


def prepare_compiler() -> None:
    """Let libtpu compile on a machine without a TPU. Call this before JAX uses a device; `devices()` calls it too.

    libtpu reads the environment when it is loaded. Without these variables it queries a metadata server that does not
    exist, complains about hosts, and aborts if another process has loaded it, which is no problem for compilation.
    """
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any value will do, because the topology names the chip
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """Parse the name of a slice.

    Args:
        name: Chip and torus such as "v5e:8x8", or a product such as "v5e-64" or "v5p-128" (v4 and v5p count two cores
            per chip).
        num_slices: Number of such slices.

    Raises:
        UserError: There is no such slice.
    """
    match = re.fullmatch(r"(\w+)(?:-(\d+)|:(\d+(?:x\d+)*))", name)
    chip = CHIPS.get(match[1]) if match else None
    if chip is None:
        raise UserError(f"unknown topology {name!r}; {_what_exists()}")
    shape = _shape_of_product(chip, int(match[2])) if match[2] else tuple(int(size) for size in match[3].split("x"))
    exists = shape and len(shape) == chip.torus_dims and 1 <= math.prod(shape) <= chip.largest_slice
    if not exists or num_slices < 1:
        raise UserError(f"{chip.name} has no slice {name!r}; {_what_exists()}")
    return Topology(chip, shape, num_slices)


def _shape_of_product(chip: Chip, number: int) -> tuple[int, ...] | None:
    shapes = _CUBIC_SHAPES if chip.torus_dims == 3 else _FLAT_SHAPES
    chips, remainder = divmod(number, chip.cores_in_name)
    return None if remainder else shapes.get(chips)


def _what_exists() -> str:
    products = []
    for chip in CHIPS.values():
        shapes = _CUBIC_SHAPES if chip.torus_dims == 3 else _FLAT_SHAPES
        products.append(f"{chip.name}-{{{','.join(str(n * chip.cores_in_name) for n in shapes)}}}")
    tori = "v5p:4x4x4 (v4, v5p: three dimensions) or v5e:8x8 (v5e, v6e: two)"
    return f"choose one of {', '.join(products)}, or a torus such as {tori}"
