"""The cost of collectives: the bytes moved, the torus dimensions crossed, and the time at the speed of the links.

S is the number of bytes that one chip contributes, n the size of its group, and B the bytes/s that leave a chip over
the dimensions that the group spans. A chip has two links on a ring, one on a line (the chip at its end has no more),
and fewer where interleaved groups share links.

    kind                moved, bytes/chip      seconds
    all-gather          (n-1) S                moved / B
    reduce-scatter      (n-1)/n S              moved / B
    all-reduce          2 (n-1)/n S            moved / B
    all-to-all          (n-1)/n S              a S / (4 links) of the worst dimension (a chips), where halves exchange
    collective-permute  S                      S x messages over the busiest link / link

All dimensions of a group work at once and in both directions, as in the TPU compiler's "ND ring" strategies. The time
is at least one microsecond per hop.

Groups never leave a slice. Transfers between slices are a pair of send and recv through the hosts' network cards (DCN).
For them, n is the number of slices and B a chip's share of its host's bandwidth.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from mask2dit_jax.parallel.chips import Topology
from mask2dit_jax.tpu.hlo import Computation, Instruction

HOP_SECONDS = 1e-6
DCN = "dcn"


@dataclass(frozen=True)
class Collective:
    """One collective operation, seen from one chip.

    Attributes:
        kind: HLO opcode, such as "all-gather".
        group_size: Number of chips that take part.
        across: Torus dimensions that the group spans, such as "xy", or DCN.
        moved_bytes: Bytes that the chip sends.
        seconds: Duration.
    """

    kind: str
    group_size: int
    across: str
    moved_bytes: float
    seconds: float


class Interconnect:
    """The links between the chips of a compiled program."""

    def __init__(self, topology: Topology, devices: list):
        """Initialise from the devices of the topology, in the order of the program's mesh."""
        self._topology = topology
        slices = [getattr(device, "slice_index", None) or 0 for device in devices]
        # A program for several slices numbers the chips within each slice. All slices are alike.
        one_slice = [device for device, index in zip(devices, slices, strict=True) if index == slices[0]]
        self._coords = np.array([device.coords[: topology.chip.torus_dims] for device in one_slice])

    def measure(self, computation: Computation, instruction: Instruction, kind: str) -> Collective:
        """Measure a collective operation within a slice.

        Args:
            computation: Computation that contains the instruction.
            instruction: The operation.
            kind: Its kind, which may differ from its opcode (an all-reduce that keeps a shard is a reduce-scatter).
        """
        size = math.fsum(array.bytes for name in instruction.operands for array in computation.arrays_of(name))
        if kind == "collective-permute":
            return self._permute(size, _pairs(instruction.attributes))
        group = first_group(instruction.attributes, len(self._coords))
        moved = _moved(kind, size, len(group))
        spans = self._spans(group)
        seconds = max(self._ici_seconds(kind, size, moved, spans), HOP_SECONDS * sum(span.hops for span in spans))
        return Collective(kind, len(group), "".join("xyz"[span.dim] for span in spans), moved, seconds)

    def measure_send(self, computation: Computation, send: Instruction, kind: str) -> Collective:
        """Measure a collective operation between slices, given its send instruction."""
        size = computation.arrays_of(send.operands[0])[0].bytes
        chip, slices = self._topology.chip, self._topology.num_slices
        moved = _moved(kind, size, slices)
        return Collective(kind, slices, DCN, moved, moved * chip.chips_per_host / chip.dcn_host_bandwidth)

    def _ici_seconds(self, kind, size, moved, spans) -> float:
        if not spans:
            return 0.0
        link = self._topology.chip.ici_link_bandwidth
        if "all-to-all" in kind:
            return max(span.chips * size / (4 * span.links * link) for span in spans)
        return moved / (link * sum(span.links for span in spans))

    def _spans(self, group) -> list["_Span"]:
        """Return the dimensions that a group spans. A group that is not a box of the torus gets one link in all."""
        coords = self._coords[group]
        spans = []
        for dim, size in enumerate(self._topology.shape):
            places = np.unique(coords[:, dim])
            strides = np.unique(np.diff(places))
            if len(places) == 1:
                continue
            even, stride = len(strides) == 1, int(strides.max())
            ring = even and self._topology.wraps(dim) and len(places) * stride == size
            spans.append(_Span(dim, len(places), (2 if ring else 1) / stride, len(places) // 2 if ring else size - 1))
        if math.prod(span.chips for span in spans) == len(group):
            return spans
        links = min(span.links for span in spans) / len(spans)
        return [_Span(span.dim, len(group), links, len(group) // len(spans)) for span in spans]

    def _permute(self, size: float, pairs: list[tuple[int, int]]) -> Collective:
        """Measure a permutation whose messages go along x, then y, then z, the shorter way around a ring."""
        load, hops, dims = Counter(), 0, set()
        for source, target in pairs:
            route = self._route(self._coords[source].tolist(), self._coords[target].tolist())
            load.update(route)
            hops = max(hops, len(route))
            dims |= {dim for _, dim, _ in route}
        across = "".join("xyz"[dim] for dim in sorted(dims))
        seconds = max(load.values(), default=0) * size / self._topology.chip.ici_link_bandwidth
        return Collective("collective-permute", len(pairs), across, size, max(seconds, HOP_SECONDS * hops))

    def _route(self, at: list, to: list) -> list[tuple]:
        """Return (chip, dimension, direction) of each link that a message takes."""
        route, place = [], list(at)
        for dim, size in enumerate(self._topology.shape):
            ahead = to[dim] - at[dim]
            if self._topology.wraps(dim) and abs(ahead) > size / 2:
                ahead -= size if ahead > 0 else -size
            direction = 1 if ahead > 0 else -1
            for _ in range(abs(ahead)):
                route.append((tuple(place), dim, direction))
                place[dim] = (place[dim] + direction) % size
        return route


@dataclass(frozen=True)
class _Span:
    """The extent of a group along one torus dimension.

    Attributes:
        dim: Index of the dimension.
        chips: Number of the group's chips along it.
        links: Links per chip in one direction, on average.
        hops: Hops between the chips farthest apart.
    """

    dim: int
    chips: int
    links: float
    hops: int


def _moved(kind: str, size: float, n: int) -> float:
    """Return the bytes that each of n chips sends if it contributes `size` bytes."""
    return size * {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)


def first_group(attributes: str, num_partitions: int) -> list[int]:
    """Parse the first of an operation's groups of partitions.

    All groups are alike, because XLA derives them from a mesh. XLA has three notations. {{0,1},{2,3}} lists the groups.
    [2,2]<=[4] and [2,2]<=[2,2]T(1,0) lay out the numbers, transpose them and cut them into rows. mesh['a'=2,'b'=2]
    {'b'} names axes of a mesh, where 'b':(2)4 is the part of size 4 of axis b behind a part of size 2.

    Args:
        attributes: Text of the instruction's attributes.
        num_partitions: Size of the only group if the text is replica_groups={}.

    Raises:
        ValueError: The text has none of these notations.
    """
    text = attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{(?:\{([\d,]*)\}|\})", text):
        return [int(number) for number in listed[1].split(",")] if listed[1] else list(range(num_partitions))
    if laid_out := re.match(r"\[(\d+),(\d+)\](<=\S*?)?, ", text + ", "):
        return _laid_out(text).reshape(int(laid_out[1]), int(laid_out[2]))[0].tolist()
    if mesh := re.match(r"mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        return _along_axes(mesh[1], mesh[2], mesh[3])
    raise ValueError(f"cannot read the groups of a collective: {text[:120]!r}")


def _laid_out(text: str) -> np.ndarray:
    """Return the numbers in the order that "<=[2,2]T(1,0)" describes: ascending, reshaped, transposed."""
    dims, order = re.search(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return (numbers.transpose(_numbers(order)) if order else numbers).reshape(-1)


def _along_axes(mesh: str, order: str, chosen: str) -> list[int]:
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = []  # (axis, stride in elements of the axis, size) of each chosen axis or part of an axis
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        size = int(size or axes[name])
        parts.append((name, axes[name] // (int(before or 1) * size), size))
    numbers = _laid_out(order) if "<=" in order else np.arange(math.prod(axes.values()))
    numbers = numbers.reshape(tuple(axes.values()))
    group = []
    for steps in itertools.product(*(range(size) for *_, size in parts)):
        at = dict.fromkeys(axes, 0)
        for (name, stride, _), step in zip(parts, steps, strict=True):
            at[name] += stride * step
        group.append(int(numbers[tuple(at.values())]))
    return group


def _pairs(attributes: str) -> list[tuple[int, int]]:
    listed = re.search(r"source_target_pairs=\{([\d,{}]*)\}", attributes)
    return [(int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", listed[1])]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
