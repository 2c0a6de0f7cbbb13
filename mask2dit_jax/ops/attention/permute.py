"""Moves of token runs to other positions, the same on all shards or different on each."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Floats


class Move(NamedTuple):
    """A move of `size` tokens, from index `source` to index `target`."""

    source: int
    target: int
    size: int


class Moves(NamedTuple):
    """The moves of each shard and the number of tokens after them. Positions without a move are padding."""

    shards: tuple[tuple[Move, ...], ...]
    length: int


def move(x: Floats["h l m"], moves: Moves, shard=0) -> Floats["h length m"]:
    """Return the tokens of a shard at their new positions. Padding holds arbitrary finite values.

    Args:
        x: Tokens before the moves.
        moves: Moves of all shards.
        shard: Index of this shard; may be traced.
    """
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
    """Move with the same program and shapes on every shard.

    The i-th move of every shard copies as many tokens as the longest i-th move. The surplus of a shorter one lands
    behind its own tokens, where the next move overwrites it, or in padding.
    """
    slots = max(map(len, moves))
    nothing = Move(0, length, 0)  # into the spare room at the end, which is cut off
    table = np.array([[*each, *[nothing] * (slots - len(each))] for each in moves])
    sizes = table[:, :, 2].max(axis=0)
    room = [(0, 0), (0, int(sizes.max())), (0, 0)]
    out = jnp.pad(jnp.zeros((x.shape[0], length, x.shape[2]), x.dtype), room)
    x = jnp.pad(x, room)
    for (source, target, _), size in zip(jnp.asarray(table)[shard], sizes, strict=True):
        part = jax.lax.dynamic_slice_in_dim(x, source, int(size), axis=1)
        out = jax.lax.dynamic_update_slice_in_dim(out, part, target, axis=1)
    return out[:, :length]
