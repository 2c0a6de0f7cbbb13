"""Moving stretches of tokens to other places, the same everywhere or different on each shard."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Floats


class Move(NamedTuple):
    """`size` tokens from `source` on go to `target` on."""

    source: int
    target: int
    size: int


class Moves(NamedTuple):
    """The moves of every shard, and how many tokens there are afterwards. What nothing is moved to is padding."""

    shards: tuple[tuple[Move, ...], ...]
    length: int


def move(x: Floats["h l m"], moves: Moves, shard=0) -> Floats["h length m"]:
    """The tokens of `shard`, which may be traced, at their new places. Padding holds any finite values."""
    ordered = [sorted(shard_moves, key=lambda move: move.target) for shard_moves in moves.shards]
    if all(each == ordered[0] for each in ordered):
        return _move_alike(x, ordered[0], moves.length)
    return _move_by_shard(x, ordered, moves.length, shard)


def _move_alike(x, moves: Sequence[Move], length: int):
    parts, at = [], 0
    for source, target, size in [*moves, Move(0, length, 0)]:
        if target > at:
            parts.append(jnp.zeros((x.shape[0], target - at, x.shape[2]), x.dtype))
        parts.append(x[:, source : source + size])
        at = target + size
    return jnp.concatenate(parts, axis=1)


def _move_by_shard(x, moves: Sequence[Sequence[Move]], length: int, shard):
    """Program and shapes are the same on every shard: each move takes as many tokens as the longest of its kind.

    What a shard moves too much lies after its own tokens, where the next move overwrites it, or in padding.
    """
    slots = max(map(len, moves))
    nothing = Move(0, length, 0)  # to the spare room at the end, which is cut off
    table = np.array([[*each, *[nothing] * (slots - len(each))] for each in moves])
    sizes = table[:, :, 2].max(axis=0)
    room = [(0, 0), (0, int(sizes.max())), (0, 0)]
    out = jnp.pad(jnp.zeros((x.shape[0], length, x.shape[2]), x.dtype), room)
    x = jnp.pad(x, room)
    for (source, target, _), size in zip(jnp.asarray(table)[shard], sizes, strict=True):
        part = jax.lax.dynamic_slice_in_dim(x, source, int(size), axis=1)
        out = jax.lax.dynamic_update_slice_in_dim(out, part, target, axis=1)
    return out[:, :length]
