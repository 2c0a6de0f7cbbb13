"""A report on a program compiled for a TPU slice: whether it fits, and what one step costs.

    topology = parse_topology("v5p:4x4x4")
    report = compile_and_analyse(lowered, topology=topology, model_flops=ModelFlops(...), name="5b sft")
    print(format_table([report])); report.to_json()

All figures are for one chip and one step (one call of the program):

    hbm peak         Arguments + temporaries + results that do not reuse an argument's buffer + the program itself.
    matmul flops     Executed: dots and convolutions of the program, including loops and rematerialisation, without
                     kernels. Ideal: what the model needs, as given by the caller.
    attention flops  Executed: calls of Pallas kernels x FLOPs per call (given). Ideal: given. Attention without a
                     Pallas kernel counts as matrix products. attention_occupancy is the part of the surplus caused by
                     blocks (padding, and pairs that the mask forbids). The rest are products that the backward pass
                     repeats.
    roofline         The time according to `timeline`, which counts collectives only as far as computation does not hide
                     them, but at least the time of all HBM bytes at full bandwidth.
    mfu ceiling      (ideal matmul + ideal attention flops) / (peak x roofline). Rematerialisation, masked blocks and a
                     head dimension narrower than the matrix unit all lower it.

The model leaves out elementwise work beyond its bytes (a softmax is free), latencies inside the chip, an attention
kernel's repeated reads of K and V, and the hosts. A real step therefore takes longer than its roofline.
"""

import dataclasses
import re
import time
from dataclasses import dataclass

import jax

from mask2dit_jax.parallel.chips import Topology
from mask2dit_jax.tpu.collectives import Interconnect
from mask2dit_jax.tpu.hlo import Module, arrays_at_least, parse
from mask2dit_jax.tpu.timeline import KernelFlops, Work, measure

_GIB = 2**30
_HINT = (
    "more chips on the fsdp or context axis of the mesh, rematerialisation of whole blocks, a smaller batch per chip, "
    "or gradient accumulation over smaller batches"
)


@dataclass(frozen=True)
class ModelFlops:
    """The FLOPs that the model needs on one chip in one step. The backward pass counts; recomputation does not.

    Attributes:
        matmul_ideal: FLOPs of the matrix products.
        attention_ideal: FLOPs of attention over the allowed pairs.
        kernels: FLOPs that one call of each Pallas kernel executes on a chip, by a part of the kernel's name. See
            `splash_kernel_flops`.
        head_dim: Channels of a head.
        attention_occupancy: Token pairs in the computed blocks divided by the pairs that the mask allows.
    """

    matmul_ideal: float | int
    attention_ideal: float | int
    kernels: dict[str, float | int] = dataclasses.field(default_factory=dict)
    head_dim: int = 64
    attention_occupancy: float | None = None


def splash_kernel_flops(product: float | int) -> dict[str, float]:
    """Return the FLOPs of one call of each splash kernel.

    The forward kernel computes two products (logits, output), dq three (logits, dP, dQ) and dkv four (logits, dV, dP,
    dK). A dkv kernel that also yields dQ would compute a fifth, which this does not count.

    Args:
        product: FLOPs of one product over all visited blocks, for all heads and samples of a chip: 2 x head_dim per
            (query, key) pair.
    """
    return {"splash_mha_fwd": 2.0 * product, "splash_mha_dq": 3.0 * product, "splash_mha_dkv": 4.0 * product}


@dataclass(frozen=True)
class CompileReport:
    """The figures of one chip and one step, as defined in the module docstring.

    A figure is None if it is unknown because the compiler refused the program. `collective_bytes` holds the bytes that
    a chip sends, by kind. `collectives` has a row {kind, group_size, across, how, count, bytes, seconds,
    exposed_seconds} for each kind of group.
    """

    name: str
    topology: str
    num_chips: int
    fits: bool
    hbm_peak_gib: float
    hbm_limit_gib: float
    hbm_headroom_gib: float
    matmul_flops_ideal: float
    attention_flops_ideal: float
    compile_seconds: float
    hbm_arguments_gib: float | None = None
    hbm_temporaries_gib: float | None = None
    matmul_flops_executed: float | None = None
    attention_flops_executed: float | None = None
    collective_bytes: dict[str, float] | None = None
    collective_seconds: float | None = None
    exposed_collective_seconds: float | None = None
    matmul_seconds: float | None = None
    attention_seconds: float | None = None
    hbm_seconds: float | None = None
    roofline_seconds: float | None = None
    mfu_ceiling: float | None = None
    kernel_calls: dict[str, int] | None = None
    attention_occupancy: float | None = None
    collectives: list[dict] | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict:
        """Return the report as plain dicts, lists, numbers and strings."""
        return dataclasses.asdict(self) | {"warnings": list(self.warnings)}


def compile_and_analyse(
    lowered: jax.stages.Lowered,
    *,
    topology: Topology,
    model_flops: ModelFlops,
    name: str = "",
    hint: str = _HINT,
    tokens: tuple[int, int] | None = None,
    compiler_options: dict | None = None,
) -> CompileReport:
    """Compile a lowered program and report on it. A program that does not fit gets a report, too.

    Args:
        lowered: Program lowered for devices of the topology.
        topology: Slice to compile for.
        model_flops: FLOPs that the model needs.
        name: Name of the program, for the table.
        hint: Advice for a program that does not fit.
        tokens: See `analyse`.
        compiler_options: Options of the TPU compiler.

    Raises:
        JaxRuntimeError: The compiler fails for a reason other than the size of HBM.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options)
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        return refused(error, topology=topology, compile_seconds=seconds, model_flops=model_flops, name=name, hint=hint)
    seconds = time.perf_counter() - start
    return analyse(
        compiled,
        topology=topology,
        compile_seconds=seconds,
        model_flops=model_flops,
        name=name,
        hint=hint,
        tokens=tokens,
    )


def analyse(
    compiled: jax.stages.Compiled,
    *,
    topology: Topology,
    compile_seconds: float,
    model_flops: ModelFlops,
    name: str = "",
    hint: str = _HINT,
    tokens: tuple[int, int] | None = None,
) -> CompileReport:
    """Report on a compiled program.

    Args:
        compiled: Program compiled for `topology`. Its arguments must have shardings over a mesh.
        topology: Slice that the program was compiled for.
        compile_seconds: Duration of the compilation.
        model_flops: FLOPs that the model needs.
        name: Name of the program, for the table.
        hint: Advice for a program that does not fit.
        tokens: Tokens of a chip and of a whole sample. The report warns of arrays of that size, which only dense
            attention should need.

    Raises:
        ValueError: No argument has a NamedSharding.
    """
    chip = topology.chip
    kernels = KernelFlops(model_flops.kernels, model_flops.head_dim)
    module = parse(compiled.as_text())
    work = measure(module, chip, Interconnect(topology, _devices(compiled)), kernels)
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    program = memory.generated_code_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results + program
    hbm_seconds = work.hbm_bytes / chip.hbm_bandwidth
    roofline = max(work.seconds, hbm_seconds)
    ideal = model_flops.matmul_ideal + model_flops.attention_ideal
    return CompileReport(
        **_memory_fields(float(peak), topology),
        **_given_fields(topology, compile_seconds, model_flops, name),
        hbm_arguments_gib=memory.argument_size_in_bytes / _GIB,
        hbm_temporaries_gib=memory.temp_size_in_bytes / _GIB,
        matmul_flops_executed=work.matmul_flops,
        attention_flops_executed=work.kernel_flops,
        collective_bytes=_bytes_by_kind(work),
        collective_seconds=work.collective_seconds,
        exposed_collective_seconds=work.exposed_seconds,
        matmul_seconds=work.matmul_seconds,
        attention_seconds=work.kernel_seconds,
        hbm_seconds=hbm_seconds,
        roofline_seconds=roofline,
        mfu_ceiling=ideal / (chip.peak_flops * roofline) if roofline else 0.0,
        kernel_calls=dict(work.kernels),
        collectives=_collective_rows(work),
        warnings=(*_does_not_fit(float(peak), topology, hint), *_left_out(work), *_quadratic(module, tokens)),
    )


def refused(
    error: Exception,
    *,
    topology: Topology,
    compile_seconds: float,
    model_flops: ModelFlops,
    name: str = "",
    hint: str = _HINT,
) -> CompileReport:
    """Report on a program that the compiler refused because it does not fit into HBM.

    Args:
        error: Error of the compiler.
        topology: Slice that was compiled for.
        compile_seconds: Duration until the error.
        model_flops: FLOPs that the model needs.
        name: Name of the program, for the table.
        hint: Advice for a program that does not fit.

    Raises:
        Exception: `error` itself, if it has another reason.
    """
    needed = _needed_bytes(str(error))
    if needed is None:
        raise error
    return CompileReport(
        **_memory_fields(needed, topology),
        **_given_fields(topology, compile_seconds, model_flops, name),
        warnings=_does_not_fit(needed, topology, hint),
    )


def format_table(reports: list[CompileReport]) -> str:
    """Format a table with one row per report, followed by their warnings."""
    rows = [_COLUMNS, *(_row(report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    notes = [f"{report.name or report.topology}: {warning}" for report in reports for warning in report.warnings]
    return "\n".join([*lines, *notes])


_COLUMNS = (
    "program", "topology", "args GiB", "temps GiB", "peak GiB", "limit GiB", "free GiB", "matmul TF", "of ideal",
    "attention TF", "of ideal", "collectives s", "exposed s", "roofline s", "MFU <=", "compile s",
)  # fmt: skip


def _row(report: CompileReport) -> tuple[str, ...]:
    def number(value, digits=2, scale=1.0):
        return "-" if value is None else f"{value / scale:.{digits}f}"

    def ratio(executed, ideal):
        return "-" if executed is None or not ideal else f"{executed / ideal:.2f}x"

    return (
        report.name or "-",
        report.topology,
        number(report.hbm_arguments_gib),
        number(report.hbm_temporaries_gib),
        number(report.hbm_peak_gib),
        number(report.hbm_limit_gib),
        number(report.hbm_headroom_gib),
        number(report.matmul_flops_executed, 1, 1e12),
        ratio(report.matmul_flops_executed, report.matmul_flops_ideal),
        number(report.attention_flops_executed, 1, 1e12),
        ratio(report.attention_flops_executed, report.attention_flops_ideal),
        number(report.collective_seconds, 3),
        number(report.exposed_collective_seconds, 3),
        number(report.roofline_seconds, 3),
        "-" if report.mfu_ceiling is None else f"{report.mfu_ceiling:.1%}",
        number(report.compile_seconds, 0),
    )


def _devices(compiled: jax.stages.Compiled) -> list:
    """Return the devices by partition number. Partitions are numbered in the order of the mesh."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    mesh = next((s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)
    if mesh is None:
        raise ValueError("no argument of the program has a NamedSharding, so its devices are unknown")
    return list(mesh.devices.flat)


def _memory_fields(peak: float, topology: Topology) -> dict:
    limit = topology.chip.hbm_gib
    return {
        "fits": peak / _GIB <= limit,
        "hbm_peak_gib": peak / _GIB,
        "hbm_limit_gib": limit,
        "hbm_headroom_gib": limit - peak / _GIB,
    }


def _given_fields(topology: Topology, compile_seconds: float, model_flops: ModelFlops, name: str) -> dict:
    return {
        "name": name,
        "topology": topology.name,
        "num_chips": topology.num_chips,
        "compile_seconds": compile_seconds,
        "matmul_flops_ideal": float(model_flops.matmul_ideal),
        "attention_flops_ideal": float(model_flops.attention_ideal),
        "attention_occupancy": model_flops.attention_occupancy,
    }


def _bytes_by_kind(work: Work) -> dict[str, float]:
    by_kind = {}
    for (kind, *_), total in work.collectives.items():
        by_kind[kind] = by_kind.get(kind, 0.0) + total.moved_bytes
    return by_kind


def _collective_rows(work: Work) -> list[dict]:
    rows = []
    for (kind, group_size, across, how), total in work.collectives.items():
        row = {"kind": kind, "group_size": group_size, "across": across, "how": how, "count": total.count}
        seconds = {"seconds": total.seconds, "exposed_seconds": total.exposed_seconds}
        rows.append(row | {"bytes": total.moved_bytes} | seconds)
    return sorted(rows, key=lambda row: -row["exposed_seconds"])


def _does_not_fit(peak: float, topology: Topology, hint: str) -> tuple[str, ...]:
    over = peak / _GIB - topology.chip.hbm_gib
    if over <= 0:
        return ()
    limit = f"the {topology.chip.hbm_gib} GiB of a {topology.chip.name} chip"
    return (f"does not fit: {over:.2f} GiB more than {limit}; try {hint}",)


def _left_out(work: Work) -> tuple[str, ...]:
    """Return warnings about work that the figures leave out."""
    kernels = [f"no FLOPs given for kernel {name}; its time is left out" for name in sorted(work.uncounted_kernels)]
    loops = [f"the length of loop {name} is unknown; counted as one iteration" for name in work.unknown_loops]
    return (*kernels, *loops)


def _quadratic(module: Module, tokens: tuple[int, int] | None) -> tuple[str, ...]:
    found = arrays_at_least(module, *tokens) if tokens else []
    return tuple(f"array of tokens x tokens: {name} {array.dtype}{list(array.dims)}" for name, array in found[:3])


def _needed_bytes(message: str) -> float | None:
    """Parse the needed bytes from "(340.00G) exceeds available HBM (15.75G)" or "Used 17.2G of 15.75G hbm"."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({size}\) exceeds available HBM|Used {size} of [\d.]+[KMGT]? hbm", message)
    if found is None:
        return None
    number, unit = (group for group in found.groups() if group is not None)
    return float(number) * 1024 ** " KMGT".index(unit or " ")
