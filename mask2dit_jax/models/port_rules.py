"""Port tables: they say which tensor of a torch checkpoint is which NNX parameter, and work both ways.

A table is a tuple of `Rule`s. A rule's `key` and `path` are templates with the same `{placeholders}`, each of which is
an integer. `{layer}` is special: it occurs in the key only and indexes the leading axis of a stacked NNX parameter.

    Rule("blocks.{layer}.attn.to_q.weight", "blocks.attn.query.kernel", LINEAR)
    Rule("encoder.down.{i}.conv.weight", "encoder.down.{i}.conv.kernel", CONV3D)

Porting is strict: a checkpoint key without a rule, a parameter that no key fills and a shape that differs are errors
that name the tensor. The NNX side is an abstract state (`jax.eval_shape`), so checking a table takes no memory.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mask2dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor changes layout. Both functions take and return arrays and use array methods only."""

    to_nnx: Callable[[Any], Any]
    to_torch: Callable[[Any], Any]


KEEP = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)  # (out, in) <-> (in, out)
CONV2D = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # oihw <-> hwio
CONV3D = Transform(lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2))  # oithw <-> thwio


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a port table.

    Attributes:
        key: template of the tensor's name in a torch checkpoint.
        path: template of the NNX parameter's path.
        transform: how the tensor changes layout.
        aliases: other names of the same tensor; a checkpoint needs only one of all names.
    """

    key: str
    path: str
    transform: Transform = KEEP
    aliases: tuple[str, ...] = ()

    @functools.cached_property
    def key_pattern(self) -> re.Pattern:
        """Pattern of the checkpoint keys that this rule is for."""
        return _pattern(self.key, *self.aliases)

    @functools.cached_property
    def path_pattern(self) -> re.Pattern:
        """Pattern of the parameter paths that this rule fills."""
        return _pattern(self.path)


def _pattern(*templates: str) -> re.Pattern:
    if len(templates) > 1 and any("{" in template for template in templates):
        raise ValueError(f"aliases cannot hold placeholders: {templates}")
    escaped = (re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template)) for template in templates)
    return re.compile("|".join(escaped))


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor goes: to `state[path]`, or to `state[path][layer]` if the parameter is stacked."""

    path: str
    layer: int | None
    transform: Transform


def flatten(state) -> dict[str, Any]:
    """Return the leaves of an NNX state, concrete or abstract, by path: {"blocks.attn.query.kernel": leaf}."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def unflatten(leaves: Mapping[str, Any], like):
    """Return the state of such leaves, with the structure of `like`; the inverse of `flatten`."""
    return nnx.from_flat_state([(path, leaves[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(like)])


def plan(table: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], abstract_state, what: str = "checkpoint"):
    """Find the slot of every checkpoint key: {key: Slot}.

    Args:
        table: rules of the model.
        shapes: torch shape of every tensor in the checkpoint.
        abstract_state: NNX state whose leaves have `.shape`.
        what: name of the checkpoint in messages.

    Raises:
        UserError: a key is unknown, a shape differs, or a parameter is filled twice or not at all.
    """
    table = tuple(table)
    targets = {path: tuple(leaf.shape) for path, leaf in flatten(abstract_state).items()}
    slots, filled = {}, {}
    for key, shape in shapes.items():
        slot, rule = _find_slot(table, key, what)
        if slot.path not in targets:
            raise UserError(
                f"{what}: tensor {key!r} would fill {slot.path!r}, which this model does not have; "
                "does its config.json belong to these weights?"
            )
        expected = targets[slot.path] if slot.layer is None else targets[slot.path][1:]
        wanted = jax.eval_shape(slot.transform.to_torch, jax.ShapeDtypeStruct(expected, np.float32)).shape
        if tuple(shape) != wanted or (slot.layer is not None and slot.layer >= targets[slot.path][0]):
            raise UserError(
                f"{what}: tensor {key!r} has shape {tuple(shape)}, the model wants {wanted}"
                f"{'' if slot.layer is None else f' in {targets[slot.path][0]} layers'}; "
                "does its config.json belong to these weights?"
            )
        earlier = filled.setdefault((slot.path, slot.layer), key)
        if earlier == key:
            slots[key] = slot
        elif key not in rule.aliases and earlier not in rule.aliases:
            raise UserError(f"{what}: tensors {earlier!r} and {key!r} are both meant for {slot.path!r}")
    _check_all_filled(table, targets, filled, what)
    return slots


def _find_slot(table, key, what) -> tuple[Slot, Rule]:
    for rule in table:
        match = rule.key_pattern.fullmatch(key)
        if match:
            holes = match.groupdict()
            layer = holes.pop("layer", None)
            return Slot(rule.path.format(**holes), None if layer is None else int(layer), rule.transform), rule
    raise UserError(f"{what}: tensor {key!r} is not one this model knows; remove it or use the matching model kind")


def _check_all_filled(table, targets, filled, what):
    for path, shape in targets.items():
        for layer in range(shape[0]) if _rule_of_path(table, path).key.count("{layer}") else (None,):
            if (path, layer) not in filled:
                raise UserError(f"{what}: tensor {torch_key(table, path, layer)!r} is missing")


def _rule_of_path(table, path) -> Rule:
    for rule in table:
        if rule.path_pattern.fullmatch(path):
            return rule
    raise ValueError(f"no port rule fills parameter {path!r}")


def torch_key(table: Iterable[Rule], path: str, layer: int | None) -> str:
    """Return the checkpoint key of an NNX parameter, or of one layer of it."""
    rule = _rule_of_path(table, path)
    return rule.key.format(layer=layer, **rule.path_pattern.fullmatch(path).groupdict())


def export(table: Iterable[Rule], state) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Yield (key, torch shape, read) for every tensor; `read()` makes its array in torch's layout."""
    table = tuple(table)
    for path, leaf in flatten(state).items():
        rule = _rule_of_path(table, path)
        stacked = "{layer}" in rule.key
        shape = tuple(leaf.shape[1:] if stacked else leaf.shape)
        torch_shape = jax.eval_shape(rule.transform.to_torch, jax.ShapeDtypeStruct(shape, np.float32)).shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            yield torch_key(table, path, layer), torch_shape, functools.partial(_read, leaf, layer, rule.transform)


def _read(leaf, layer, transform) -> np.ndarray:
    value = leaf[...] if layer is None else leaf[layer]
    return np.ascontiguousarray(transform.to_torch(np.asarray(value)))
