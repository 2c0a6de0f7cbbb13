"""Walks the instructions of a compiled program in the order in which a chip runs them, and adds up.

The chip computes one instruction after another; copies between HBM and VMEM and asynchronous collectives run beside
them. Each instruction takes the longer of its time on the MXU and of its bytes through HBM, so that elementwise work
costs its bytes only. What a collective takes beyond the computation scheduled between its start and its end is exposed,
and so is all of a synchronous one. Of the branches of a conditional the longest counts.
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
    """FLOPs that one call of a Pallas kernel executes on a chip; by part of the kernel's name, the longest counts.

    head_dim: one side of each of the kernel's products is as narrow as this.
    """

    per_call: dict[str, float | int]
    head_dim: int

    def of(self, kernel: str) -> float | int | None:
        parts = [part for part in self.per_call if part in kernel]
        return self.per_call[max(parts, key=len)] if parts else None


@dataclass
class CollectiveTotal:
    count: int = 0
    moved_bytes: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass
class Work:
    """Of one chip. seconds: time by this module's model; exposed and stalled time are parts of it.

    kernels: calls by name. collectives: totals by (kind, group size, torus dimensions, "sync" or "async").
    unknown_loops: loops whose length the text does not tell, counted as one turn.
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
    """Everything that one run of a module asks of a chip, loops by the number of their turns."""
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
        for collective, ends in beside.collectives.values():  # nobody waits here: the end of the computation does
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
        # The traffic of a collective is part of its own time, but its fusion may hold matrix products.
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
    """What runs beside the computation, and when it ends. Copies queue, and so do collectives that share links."""

    copies: dict[str, float] = field(default_factory=dict)
    copies_until: float = 0.0
    collectives: dict[str, tuple[Collective, float]] = field(default_factory=dict)

    def start(self, key: str, collective: Collective, now: float) -> None:
        before = [ends for other, ends in self.collectives.values() if _share_links(other, collective)]
        self.collectives[key] = collective, max([now, *before]) + collective.seconds

    def hold_up(self, synchronous: Collective) -> None:
        """What is under way on the same links ends later by a synchronous collective, which is not hidden at all."""
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
    """phase: "sync", or "start" and "done" with the same key. operation, inside: the collective and where it stands."""

    phase: str
    key: str | None = None
    kind: str | None = None
    operation: Instruction | None = None
    inside: Computation | None = None


def _collective(module: Module, computation: Computation, instruction: Instruction) -> _Found | None:
    """The collective that an instruction is, starts or ends.

    On a TPU that is one instruction; a pair X-start, X-done; a send to other slices, which ends with the answer; or
    a fusion: one that reduces and keeps its shard (an all-reduce and a slice, in XLA's words), or a pair of fusions
    that start and end it, with others between them that push it on beside their own work and carry its chain_id.
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
