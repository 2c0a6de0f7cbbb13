"""The trip count of while loops, from XLA's own annotation or from the loop's start, step and end."""

import math
from dataclasses import dataclass

from mask2dit_jax.tpu.hlo import Computation, Instruction, Module

_PASSES_ON = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"}


@dataclass(frozen=True)
class _Carry:
    """Element `index` of a loop's carry."""

    index: int


@dataclass(frozen=True)
class Scope:
    """A computation and the loop around it, if it is a loop's body. Values that a body only passes on lie outside.

    Attributes:
        computation: The computation.
        loop: While instruction whose body it is.
        outside: Scope of that instruction.
    """

    computation: Computation
    loop: Instruction | None = None
    outside: "Scope | None" = None


def trip_count(module: Module, scope: Scope, loop: Instruction) -> int | None:
    """Return how often the body of a while instruction in `scope` runs.

    Returns None if the text does not determine it, as for a loop until convergence.
    """
    known = loop.attribute(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)')
    if known:
        return int(known)
    condition = module[loop.called("condition")]
    comparison = _comparison(module, condition, condition.root.name)
    if comparison is None:
        return None
    direction, left, right = comparison
    if isinstance(right, _Carry) and not isinstance(left, _Carry):
        direction, left, right = {"GT": "LT", "LT": "GT", "GE": "LE", "LE": "GE"}.get(direction), right, left
    if not isinstance(left, _Carry):
        return None
    inside = Scope(module[loop.called("body")], loop, scope)
    first, last = _initial(module, inside, left.index), right
    if isinstance(right, _Carry):
        last = _initial(module, inside, right.index) if _unchanged(inside, right.index) else None
    if not isinstance(first, int) or not isinstance(last, int):
        return None
    return _turns(direction, first, last, _step(module, inside, left.index))


def _turns(direction: str | None, first: int, last: int, step: int) -> int | None:
    if direction not in ("LT", "LE", "GT", "GE") or (step > 0) != (direction in ("LT", "LE")):
        return None
    inclusive = direction in ("LE", "GE")
    return max(0, math.floor((last - first) / step) + 1 if inclusive else math.ceil((last - first) / step))


def _comparison(module: Module, computation: Computation, name: str, arguments=()):
    """Return (direction, left, right) of the compare instruction at the end of a condition."""
    instruction = computation.instructions[name]
    if instruction.opcode == "compare":
        left, right = (_value(module, computation, operand, arguments) for operand in instruction.operands)
        return instruction.attribute(r"direction=(\w+)"), left, right
    if instruction.opcode in _PASSES_ON:
        return _comparison(module, computation, instruction.operands[0], arguments)
    if instruction.opcode == "fusion":
        called = module[instruction.called("calls")]
        given = [_value(module, computation, operand, arguments) for operand in instruction.operands]
        return _comparison(module, called, called.root.name, given)
    return None


def _value(module: Module, computation: Computation, name: str, arguments=()) -> int | _Carry | None:
    instruction = computation.instructions[name]
    if instruction.opcode == "constant":
        return int(instruction.arguments) if instruction.arguments.lstrip("-").isdigit() else None
    if instruction.opcode == "parameter":
        number = int(instruction.arguments)
        return arguments[number] if number < len(arguments) else None
    if instruction.opcode == "get-tuple-element":
        source = computation.instructions[instruction.operands[0]]
        index = int(instruction.attribute(r"index=(\d+)"))
        if source.opcode == "parameter":
            return _Carry(index)
        return _value(module, computation, source.operands[index], arguments) if source.opcode == "tuple" else None
    if instruction.opcode in _PASSES_ON:
        return _value(module, computation, instruction.operands[0], arguments)
    if instruction.opcode == "fusion":
        called = module[instruction.called("calls")]
        given = [_value(module, computation, operand, arguments) for operand in instruction.operands]
        return _value(module, called, called.root.name, given)
    return None


def _initial(module: Module, scope: Scope, index: int) -> int | None:
    """Return element `index` of the initial carry of the loop whose body is `scope`."""
    outside = scope.outside.computation
    start = outside.instructions[scope.loop.operands[0]]
    while start.opcode in _PASSES_ON:
        start = outside.instructions[start.operands[0]]
    if start.opcode != "tuple":
        return None
    value = _value(module, outside, start.operands[index])
    if isinstance(value, _Carry) and scope.outside.loop is not None and _unchanged(scope.outside, value.index):
        return _initial(module, scope.outside, value.index)
    return value


def _unchanged(scope: Scope, index: int) -> bool:
    """Return whether the loop's body passes on element `index` of its carry unchanged."""
    root = scope.computation.root
    if root.opcode != "tuple":
        return False
    last = scope.computation.instructions[root.operands[index]]
    while last.opcode in _PASSES_ON:
        last = scope.computation.instructions[last.operands[0]]
    return last.opcode == "get-tuple-element" and int(last.attribute(r"index=(\d+)")) == index


def _step(module: Module, scope: Scope, index: int) -> int:
    """Return what an iteration adds to element `index`, or 1 if a fusion hides it, because JAX's loops count by 1."""
    root = scope.computation.root
    last = scope.computation.instructions[root.operands[index]] if root.opcode == "tuple" else root
    while last.opcode in _PASSES_ON:
        last = scope.computation.instructions[last.operands[0]]
    if last.opcode != "add":
        return 1
    values = [_value(module, scope.computation, operand) for operand in last.operands]
    values = [_initial(module, scope, v.index) if isinstance(v, _Carry) and v.index != index else v for v in values]
    return next((value for value in values if isinstance(value, int)), 1) or 1
