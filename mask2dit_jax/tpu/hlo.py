"""A parser for compiled HLO text, which yields computations, their instructions in scheduled order, and shapes.

jaxlib also exposes the module itself (`runtime_executable().hlo_modules()`), but its instructions offer shapes and
attributes only as text, and XLA's cost analysis counts the body of a loop only once.
"""

import functools
import math
import re
from dataclasses import dataclass, field

HBM = 0  # memory space of a layout that names none; S(1) is VMEM, S(2) to S(6) are flags, scalars and host memory


@dataclass(frozen=True)
class Array:
    """The type of an array: element type, dimensions and memory space."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = HBM

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Size in bytes, without the padding of tiles."""
        return self.size * _bits(self.dtype) / 8

    @property
    def hbm_bytes(self) -> float:
        """Size in bytes if the array is in HBM, otherwise 0."""
        return self.bytes if self.memory == HBM else 0.0


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        name: Name without the leading %.
        opcode: Operation such as "dot".
        arrays: Arrays of the result; a tuple is flattened.
        arguments: Text between the parentheses of the operation.
        attributes: Text behind the parentheses.
        is_root: Whether the computation returns this result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results this one reads."""
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    def called(self, attribute: str) -> str | None:
        """Return the name of the computation in an attribute such as "calls" or "body", or None without it."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def attribute(self, pattern: str) -> str | None:
        """Search the attributes for a pattern and return its group, or None if it does not occur."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """A computation with its instructions by name, in scheduled order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict, repr=False)

    @property
    def root(self) -> Instruction:
        """The instruction whose result the computation returns."""
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter number -> instruction."""
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
        """Return the arrays of an instruction's result, given its name."""
        return self.instructions[operand].arrays


@dataclass
class Module:
    """A module with its computations by name, one of which is the entry."""

    computations: dict[str, Computation]
    entry: Computation

    def __getitem__(self, name: str) -> Computation:
        """Return a computation by name."""
        return self.computations[name]


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")


def parse(text: str) -> Module:
    """Parse the text of `compiled.as_text()`.

    Raises:
        ValueError: The text has no entry computation.
    """
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
        else:  # a kernel's metadata contains line breaks, so this line continues the previous instruction
            last.attributes += line
    if entry is None:
        raise ValueError("the text has no entry computation; pass that of a compiled module")
    return Module(computations, entry)


def arrays_at_least(module: Module, rows: int, columns: int) -> list[tuple[str, Array]]:
    """Return (instruction, array) for each array with one dimension >= rows and another >= columns, largest first.

    Given the tokens of a chip and of the whole sequence, this finds arrays of tokens x tokens, which should not exist.
    Arrays inside fusions count too, because they are computed even if they are never in memory.
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
    """Return the width of an element type: bf16 -> 16, f8e4m3fn -> 8, pred -> 8, token -> 0."""
    if dtype == "pred":
        return 8
    width = re.match(r"[a-z]+(\d+)", dtype)
    return int(width[1]) if width else 0
