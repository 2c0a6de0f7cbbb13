"""A model of a compiled program's timeline, which walks its instructions in the order in which a chip runs them.

The chip computes one instruction after another. Copies between HBM and VMEM and asynchronous collectives run beside the
computation. An instruction takes the longer of its time on the MXU and the time of its HBM bytes, so elementwise work
costs only its bytes. The time of an asynchronous collective beyond the computation between its start and its end is
exposed, and so is all time of a synchronous one. The longest branch of a conditional counts.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from mask2dit_jax.parallel.chips import Chip
from mask2dit_jax.tpu.collectives import DCN, Collective, Interconnect
from mask2dit_jax.tpu.hlo import Computation, Instruction, Module
from mask2dit_jax.tpu.loops import Scope, trip_count
from mask2dit_jax.tpu.work import COLLECTIVES, hbm_bytes, matmuls, mxu_padding


@dataclass(frozen=True)
class KernelFlops:
    """The FLOPs that one call of each Pallas kernel executes on a chip.

    Attributes:
        per_call: Part of a kernel's name -> FLOPs. The longest part that occurs in a name counts.
        head_dim: Size of the narrow side of each product.
    """

    per_call: dict[str, float | int]
    head_dim: int

    def of(self, kernel: str) -> float | int | None:
        """Return the FLOPs of a kernel by its name, or None if they are not given."""
        parts = [part for part in self.per_call if part in kernel]
        return self.per_call[max(parts, key=len)] if parts else None


@dataclass
class CollectiveTotal:
    """The sum over collectives of one kind."""

    count: int = 0
    moved_bytes: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass
class Work:
    """The work of one chip.

    Attributes:
        matmul_flops: FLOPs of dots and convolutions.
        matmul_seconds: Their time on the MXU.
        kernel_flops: FLOPs of Pallas kernels.
        kernel_seconds: Their time on the MXU.
        hbm_bytes: Bytes read from and written to HBM.
        seconds: Total time, including exposed collectives and stalls on copies.
        collective_seconds: Time of all collectives, hidden or not.
        exposed_seconds: Their time that computation does not hide.
        kernels: Number of calls by kernel name.
        uncounted_kernels: Kernels without given FLOPs, whose time is left out.
        collectives: Totals by (kind, group size, torus dimensions, "sync" or "async").
        unknown_loops: Loops of unknown length, counted as one iteration.
    """

    matmul_flops: float = 0.0
    matmul_seconds: float = 0.0
    kernel_flops: float = 0.0
    kernel_seconds: float = 0.0
    hbm_bytes: float = 0.0
    seconds: float = 0.0
    collective_seconds: float = 0.0
    exposed_seconds: float = 0.0
    kernels: Counter = field(default_factory=Counter)
    uncounted_kernels: set = field(default_factory=set)
    collectives: dict[tuple[str, int, str, str], CollectiveTotal] = field(default_factory=dict)
    unknown_loops: list[str] = field(default_factory=list)

    def add(self, other: "Work", times: float | int = 1) -> None:
        """Add the work of another computation that runs `times` times."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name, calls in other.kernels.items():
            self.kernels[name] += times * calls
        for key, total in other.collectives.items():
            mine = self.collectives.setdefault(key, CollectiveTotal())
            for name in vars(mine):
                setattr(mine, name, getattr(mine, name) + times * getattr(total, name))
        self.uncounted_kernels |= other.uncounted_kernels
        self.unknown_loops += other.unknown_loops

    def count(self, collective: Collective, exposed: float, how: str) -> None:
        """Count one collective.

        Args:
            collective: The collective.
            exposed: Seconds of it that computation does not hide.
            how: "sync" or "async".
        """
        key = (collective.kind, collective.group_size, collective.across, how)
        total = self.collectives.setdefault(key, CollectiveTotal())
        total.count += 1
        total.moved_bytes += collective.moved_bytes
        total.seconds += collective.seconds
        total.exposed_seconds += exposed
        self.collective_seconds += collective.seconds
        self.exposed_seconds += exposed


_SUMS = [name for name, kind in Work.__annotations__.items() if kind is float]


def measure(module: Module, chip: Chip, interconnect: Interconnect, kernels: KernelFlops) -> Work:
    """Return the work of one run of a module on one chip, with loops multiplied by their trip counts."""
    return _Walk(module, chip, interconnect, kernels).run(Scope(module.entry))


class _Walk:
    def __init__(self, module, chip, interconnect, kernels):
        self.module, self.chip, self.interconnect, self.kernels = module, chip, interconnect, kernels

    def run(self, scope: Scope) -> Work:
        work, beside = Work(), _Beside()
        for instruction in scope.computation.instructions.values():
            if instruction.opcode == "while":
                work.add(*self._loop(scope, instruction))
            elif instruction.opcode == "conditional":
                branches = [self.run(Scope(computation)) for computation in self._branches(instruction)]
                work.add(max(branches, key=lambda branch: branch.seconds))
            elif instruction.opcode == "call":
                called = self.module[instruction.called("to_apply")]
                work.add(self.run(Scope(called)))
            else:
                self._step(scope.computation, instruction, work, beside)
        for collective, ends in beside.collectives.values():  # the end of the computation waits for the rest
            _wait(work, collective, ends)
        return work

    def _loop(self, scope: Scope, loop: Instruction) -> tuple[Work, int]:
        turns = trip_count(self.module, scope, loop)
        body = self.run(Scope(self.module[loop.called("body")], loop, scope))
        if turns is None:
            body.unknown_loops.append(loop.name)
        return body, 1 if turns is None else turns

    def _branches(self, conditional: Instruction) -> list[Computation]:
        listed = conditional.attribute(r"branch_computations=\{([^}]*)\}")
        names = re.findall(r"[\w.\-]+", listed) if listed else [
            conditional.called("true_computation"), conditional.called("false_computation")
        ]  # fmt: skip
        return [self.module[name] for name in names]

    def _step(self, computation: Computation, instruction: Instruction, work: Work, beside: "_Beside") -> None:
        traffic = hbm_bytes(self.module, computation, instruction)
        work.hbm_bytes += traffic
        if instruction.opcode in ("copy-start", "slice-start"):
            beside.copies_until = max(beside.copies_until, work.seconds) + traffic / self.chip.hbm_bandwidth
            beside.copies[instruction.name] = beside.copies_until
            return
        if instruction.opcode in ("copy-done", "slice-done"):
            work.seconds = max(work.seconds, beside.copies.pop(instruction.operands[0], 0.0))
            return
        found = _collective(self.module, computation, instruction)
        # The traffic of a collective is part of its own time, but its fusion may contain matrix products.
        self._compute(computation, instruction, 0.0 if found else traffic, work)
        if found is None:
            return
        if found.phase == "start":
            beside.start(found.key, self._measure(found), work.seconds)
        elif found.phase == "done":
            if found.key in beside.collectives:
                _wait(work, *beside.collectives.pop(found.key))
        else:
            collective = self._measure(found)
            work.count(collective, collective.seconds, "sync")
            work.seconds += collective.seconds
            beside.hold_up(collective)

    def _measure(self, found: "_Found") -> Collective:
        across_slices = found.operation.opcode == "send"
        measure_one = self.interconnect.measure_send if across_slices else self.interconnect.measure
        return measure_one(found.inside, found.operation, found.kind)

    def _compute(self, computation: Computation, instruction: Instruction, traffic: float, work: Work) -> None:
        products = matmuls(self.module, computation, instruction, self.chip.mxu_width)
        seconds = products.mxu_flops / self.chip.peak_flops
        work.matmul_flops += products.flops
        work.matmul_seconds += seconds
        called = instruction.called("calls")
        candidates = self.module[called].instructions.values() if called else [instruction]
        for candidate in candidates:
            if 'custom_call_target="tpu_custom_call"' in candidate.attributes:
                seconds += self._kernel(candidate, work)
        work.seconds += max(seconds, traffic / self.chip.hbm_bandwidth)

    def _kernel(self, call: Instruction, work: Work) -> float:
        name = call.attribute(r'op_name="[^"]*?([^/"]+)/pallas_call"') or re.sub(r"\.\d+$", "", call.name)
        work.kernels[name] += 1
        flops = self.kernels.of(name)
        if flops is None:
            work.uncounted_kernels.add(name)
            return 0.0
        head_dim, width = self.kernels.head_dim, self.chip.mxu_width
        seconds = flops * mxu_padding(float(head_dim), float(width), width) / self.chip.peak_flops
        work.kernel_flops += flops
        work.kernel_seconds += seconds
        return seconds


@dataclass
class _Beside:
    """The copies and collectives beside the computation, and when they end. Those that share a resource queue."""

    copies: dict[str, float] = field(default_factory=dict)
    copies_until: float = 0.0
    collectives: dict[str, tuple[Collective, float]] = field(default_factory=dict)

    def start(self, key: str, collective: Collective, now: float) -> None:
        before = [ends for other, ends in self.collectives.values() if _share_links(other, collective)]
        self.collectives[key] = collective, max([now, *before]) + collective.seconds

    def hold_up(self, synchronous: Collective) -> None:
        """Delay running collectives on the same links by a synchronous one."""
        for key, (other, ends) in self.collectives.items():
            if _share_links(other, synchronous):
                self.collectives[key] = other, ends + synchronous.seconds


def _share_links(one: Collective, other: Collective) -> bool:
    if DCN in (one.across, other.across):
        return one.across == other.across
    return bool(set(one.across) & set(other.across))


def _wait(work: Work, collective: Collective, ends: float) -> None:
    exposed = max(0.0, ends - work.seconds)
    work.count(collective, exposed, "async")
    work.seconds += exposed


@dataclass(frozen=True)
class _Found:
    """A collective, its start or its end.

    Attributes:
        phase: "sync", "start" or "done".
        key: Connects a start with its end.
        kind: Kind of the collective.
        operation: Instruction of the collective.
        inside: Computation that contains `operation`.
    """

    phase: str
    key: str | None = None
    kind: str | None = None
    operation: Instruction | None = None
    inside: Computation | None = None


def _collective(module: Module, computation: Computation, instruction: Instruction) -> _Found | None:
    """Return the collective that an instruction is, starts or ends, or None.

    On a TPU, a collective can be a single instruction, a pair X-start and X-done, a send to other slices that ends with
    the reply, or fusions. A single fusion reduces and keeps its shard (an all-reduce and a slice in HLO). A pair of
    fusions starts and ends a collective; fusions between them advance it beside their own work and carry its chain_id.
    """
    opcode = instruction.opcode
    base = opcode.removesuffix("-start")
    if base in COLLECTIVES:
        phase = "sync" if base == opcode else "start"
        return _Found(phase, instruction.name, base, instruction, computation)
    if opcode == "send" and (kind := instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')):
        return _Found("start", _rendezvous(instruction), _SLICE_KINDS.get(kind, kind.lower()), instruction, computation)
    if opcode == "recv-done":
        return _Found("done", _rendezvous(computation.instructions[instruction.operands[0]]))
    if opcode.endswith("-done"):
        return _Found("done", instruction.operands[0])
    if opcode not in ("async-start", "fusion"):
        return None
    called = module[instruction.called("calls")]
    inner = next((i for i in called.instructions.values() if i.opcode in COLLECTIVES), None)
    if inner is None:
        return None
    kind = "reduce-scatter" if _keeps_shard(called, inner) else inner.opcode
    if opcode == "async-start":
        return _Found("start", instruction.name, kind, inner, called)
    chain = inner.attribute(r'chain_id="(\d+)"')
    targets = "".join(i.attributes for i in called.instructions.values() if i.opcode == "custom-call")
    if "AsyncCollectiveStart" in targets:
        return _Found("start", chain, kind, inner, called)
    if "AsyncCollectiveDone" in targets:
        return _Found("done", chain)
    pushes_on = "async_collective_fusion_config" in inner.attributes
    return None if pushes_on else _Found("sync", None, kind, inner, called)


_SLICE_KINDS = {
    "ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip


def _rendezvous(transfer: Instruction) -> str | None:
    return transfer.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"')


def _keeps_shard(called: Computation, inner: Instruction) -> bool:
    return inner.opcode == "all-reduce" and any(user.opcode == "dynamic-slice" for user in called.users[inner.name])
