"""The work of one instruction: matrix FLOPs, the time they take on the MXU, and bytes through HBM."""

import math
from dataclasses import dataclass

import numpy as np

from mask2dit_jax.tpu.hlo import HBM, Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "partition-id",
    "replica-id", "after-all", "send", "recv", "optimization-barrier", "iota", "async-start", "async-update", "domain",
}  # fmt: skip
# Custom calls that name or place a buffer but move no data.
_NO_TRAFFIC_TARGETS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "AsyncCollective")


@dataclass(frozen=True)
class Matmuls:
    """The matrix products of an instruction.

    Attributes:
        flops: 2 x multiply-adds.
        mxu_flops: Time that the matrix unit is busy, in FLOPs at its peak rate.
    """

    flops: float = 0.0
    mxu_flops: float = 0.0

    def __add__(self, other: "Matmuls") -> "Matmuls":
        """Return the sum of both."""
        return Matmuls(self.flops + other.flops, self.mxu_flops + other.mxu_flops)


def mxu_padding(contracted: float, columns: float, width: int) -> float:
    """Return the slowdown of a product whose sides do not fill the width x width unit, such as 2 for 64 on 128.

    Args:
        contracted: Size of the contracted dimension.
        columns: Size of the other dimension that lies in the unit.
        width: Side of the matrix unit.
    """
    return math.prod(math.ceil(size / width) * width / size for size in (contracted, columns) if size)


def matmuls(module: Module, computation: Computation, instruction: Instruction, mxu_width: int) -> Matmuls:
    """Return the products of a dot, a convolution (into which the TPU compiler turns most dots), or a whole fusion.

    Args:
        module: Module of the instruction.
        computation: Computation that contains the instruction.
        instruction: Any instruction; most have no products.
        mxu_width: Side of the matrix unit.
    """
    if instruction.opcode in ("fusion", "call", "async-start"):
        inner = module[instruction.called("calls") or instruction.called("to_apply")]
        each = (matmuls(module, inner, i, mxu_width) for i in inner.instructions.values())
        return sum(each, Matmuls())
    if instruction.opcode not in ("dot", "convolution"):
        return Matmuls()
    measure = _dot if instruction.opcode == "dot" else _convolution
    rows, contracted, columns, batch = measure(computation, instruction)
    flops = 2.0 * batch * rows * contracted * columns
    # Either operand may stay in the unit, so the better fit counts.
    padding = min(mxu_padding(contracted, side, mxu_width) for side in (rows, columns))
    return Matmuls(flops, flops * padding * _passes(instruction))


def _passes(instruction: Instruction) -> int:
    """Return the number of bf16 passes of a product: six for float32 of precision "highest", three for "high"."""
    precision = instruction.attribute(r"operand_precision=\{(\w+)")
    return {"highest": 6, "high": 3}.get(precision, 1)


def _dot(computation: Computation, dot: Instruction) -> tuple[float, float, float, float]:
    left, right = (computation.arrays_of(operand)[0].dims for operand in dot.operands[:2])
    contracting, batching = (
        [int(d) for d in (dot.attribute(rf"\blhs_{kind}_dims=\{{([\d,]*)\}}") or "").split(",") if d]
        for kind in ("contracting", "batch")
    )
    contracted, batch = (math.prod(left[d] for d in dims) for dims in (contracting, batching))
    rows, columns = (math.prod(side) / contracted / batch for side in (left, right))
    return rows, float(contracted), columns, float(batch)


def _convolution(computation: Computation, convolution: Instruction) -> tuple[float, float, float, float]:
    """Return (rows, contracted, columns, batch) of a convolution as a product. Taps in the padding do no work.

    The compiler writes products with batch or head dimensions as convolutions. Each such dimension has as many taps as
    output positions, and at each position a single tap meets the image. That is a batch dimension, or additional
    columns if the image has only one element.
    """
    image, kernel = (computation.arrays_of(operand)[0].dims for operand in convolution.operands[:2])
    result = convolution.arrays[0].dims
    image_labels, rest = convolution.attribute(r"dim_labels=([\w>\-]+)").split("_")
    kernel_labels, result_labels = rest.split("->")
    rows = image[image_labels.index("b")] / int(convolution.attribute(r"batch_group_count=(\d+)") or 1)
    contracted, columns = (float(kernel[kernel_labels.index(label)]) for label in "io")
    batch = 1.0
    spatial = sorted(label for label in result_labels if label.isdigit())
    window = _window(convolution, len(spatial))
    for index, label in enumerate(spatial):
        labelled = ((image, image_labels), (kernel, kernel_labels), (result, result_labels))
        elements, taps, places = (dims[labels.index(label)] for dims, labels in labelled)
        meet = _taps_that_meet(elements, taps, places, **{key: values[index] for key, values in window.items()})
        if taps > 1 and meet == places:
            batch, columns = (batch, columns * places) if elements == 1 else (batch * places, columns)
        else:
            rows, contracted = rows * places, contracted * meet / places
    return rows, contracted, columns, batch


def _window(convolution: Instruction, dims: int) -> dict[str, list[int]]:
    text = convolution.attribute(r"window=\{([^}]*)\}") or ""
    given = dict(part.split("=") for part in text.split())

    def values(key, default):
        return [int(value) for value in given[key].split("x")] if key in given else [default] * dims

    padding = given["pad"].split("x") if "pad" in given else ["0_0"] * dims
    return {
        "stride": values("stride", 1),
        "image_dilation": values("lhs_dilate", 1),
        "kernel_dilation": values("rhs_dilate", 1),
        "low": [int(pad.split("_")[0]) for pad in padding],
    }


def _taps_that_meet(
    elements: int, taps: int, places: int, *, stride: int, image_dilation: int, kernel_dilation: int, low: int
) -> int:
    """Count the (position, tap) pairs of a spatial dimension that meet an element of the image, not padding or gaps."""
    at = (np.arange(places) * stride)[:, None] + np.arange(taps)[None] * kernel_dilation - low
    inside = (at >= 0) & (at <= (elements - 1) * image_dilation) & (at % image_dilation == 0)
    return int(np.count_nonzero(inside))


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Return the bytes that an instruction outside a fusion reads from and writes to HBM, counting each array once.

    A slice taken inside a fusion counts as the slice, and an update in place as the update. Otherwise a scanned model
    would seem to read all layers in every layer. Arrays that the compiler keeps in VMEM cost nothing.
    """
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
        return 0.0
    if opcode == "custom-call" and any(target in instruction.attributes for target in _NO_TRAFFIC_TARGETS):
        return 0.0
    if opcode in ("copy-start", "slice-start"):  # (target, source, flag) and (source, target, flag)
        ends = instruction.arrays[:2]
        return min(end.bytes for end in ends) * sum(end.memory == HBM for end in ends)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.arrays[0].hbm_bytes
    if opcode in ("dynamic-update-slice", "scatter"):
        update = computation.arrays_of(instruction.operands[-1 if opcode == "scatter" else 1])[0]
        return 2 * update.bytes if instruction.arrays[0].hbm_bytes else 0.0
    if opcode == "fusion":
        return _fusion_bytes(module, computation, instruction)
    arrays = [array for name in dict.fromkeys(instruction.operands) for array in computation.arrays_of(name)]
    return math.fsum(array.hbm_bytes for array in (*arrays, *instruction.arrays))


def _fusion_bytes(module: Module, computation: Computation, fusion: Instruction) -> float:
    called = module[fusion.called("calls")]
    total = 0.0
    for number, operand in enumerate(fusion.operands):
        arrays = computation.arrays_of(operand)
        if len(arrays) == 1 and arrays[0].hbm_bytes:
            total += _read_bytes(module, called, called.parameters[number])
    root = called.root
    results = [called.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) == len(fusion.arrays):
        return total + sum(
            _written_bytes(called, result)
            for result, array in zip(results, fusion.arrays, strict=True)
            if array.hbm_bytes
        )
    return total  # a custom fusion that starts or ends a collective


def _read_bytes(module: Module, computation: Computation, value: Instruction) -> float:
    full = value.arrays[0].bytes
    total = 0.0
    for user in computation.users[value.name]:
        if user.opcode == "dynamic-slice" and user.operands[0] == value.name:
            total += user.arrays[0].bytes
        elif user.opcode == "bitcast":
            total += _read_bytes(module, computation, user)
        elif user.opcode == "fusion":
            inner = module[user.called("calls")]
            total += _read_bytes(module, inner, inner.parameters[user.operands.index(value.name)])
        elif not (_in_place(user, value.name) or user.opcode == "tuple" or user.opcode in COLLECTIVES):
            return full
    return min(total, full)


def _in_place(user: Instruction, operand: str) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == operand


def _written_bytes(computation: Computation, result: Instruction) -> float:
    while result.opcode == "bitcast":
        result = computation.instructions[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return computation.arrays_of(result.operands[1])[0].bytes
    if result.opcode in ("parameter", *COLLECTIVES):  # passed through beside a running collective
        return 0.0
    return math.fsum(array.bytes for array in result.arrays)
