"""A compiled module's text as Python objects: computations, their instructions in scheduled order, and shapes.

jaxlib hands out the module itself too (`runtime_executable().hlo_modules()`), but an instruction there has no shape and
no attributes except in its text, and XLA's own cost analysis counts the body of a loop once. So the text it is.
"""

import functools
import math
import re
from dataclasses import dataclass, field

HBM = 0  # memory space of a layout that names none; S(1) is VMEM, S(2) to S(6) are flags, scalars and the host's


@dataclass(frozen=True)
class Array:
    """Type of one array. bytes: its size without the padding of tiles."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = HBM

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * _bits(self.dtype) / 8

    @property
    def hbm_bytes(self) -> float:
        return self.bytes if self.memory == HBM else 0.0


@dataclass
class Instruction:
    """arrays: the result's arrays, a tuple flattened. arguments: the text between the parentheses of the operation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    def called(self, attribute: str) -> str | None:
        """Name of the computation that an attribute like "calls" or "body" names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def attribute(self, pattern: str) -> str | None:
        """The group of a pattern, looked for in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict, repr=False)

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Operand -> the instructions that read it."""
        users = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users

    def arrays_of(self, operand: str) -> tuple[Array, ...]:
        return self.instructions[operand].arrays


@dataclass
class Module:
    computations: dict[str, Computation]
    entry: Computation

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations, entry, current, last = {}, None, None, None
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations[match[2]] = Computation(match[2])
                entry = current if match[1] else entry
        elif line == "}":
            current = None
        elif match := _INSTRUCTION.match(line):
            last = _instruction(match[2], line[match.end() :], bool(match[1]))
            current.instructions[last.name] = last
        else:  # a kernel's metadata holds line breaks; what follows them belongs to the instruction above
            last.attributes += line
    if entry is None:
        raise ValueError("this text holds no entry computation; is it that of a compiled module?")
    return Module(computations, entry)


def arrays_at_least(module: Module, rows: int, columns: int) -> list[tuple[str, Array]]:
    """(instruction, array) of each array with one dimension >= rows and another >= columns, largest first.

    With the tokens of a chip and those of the whole sequence it finds the S x S arrays that must not be. Arrays inside
    fusions count as well: they may never be in memory, but they are computed.
    """
    small, large = sorted((rows, columns))
    found = {}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            for array in instruction.arrays:
                *_, second, first = sorted((0, 0, *array.dims))
                if second >= small and first >= large:
                    found.setdefault(array, instruction.name)
    return sorted(((name, array) for array, name in found.items()), key=lambda pair: -pair[1].bytes)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    type_end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    opcode_end = text.index("(", type_end)
    arguments_end = _closing(text, opcode_end)
    return Instruction(
        name=name,
        opcode=text[type_end:opcode_end].strip(),
        arrays=_arrays(text[:type_end]),
        arguments=text[opcode_end + 1 : arguments_end],
        attributes=text[arguments_end + 1 :],
        is_root=is_root,
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[start : start + 80]!r}")


@functools.lru_cache(maxsize=4096)
def _arrays(text: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        memory = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
        arrays.append(Array(dtype, sizes, int(memory[1]) if memory else HBM))
    return tuple(arrays)


def _bits(dtype: str) -> int:
    """bf16 -> 16, f8e4m3fn -> 8, pred -> 8; tokens and the like hold nothing."""
    if dtype == "pred":
        return 8
    width = re.match(r"[a-z]+(\d+)", dtype)
    return int(width[1]) if width else 0
