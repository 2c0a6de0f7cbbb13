"""Attention on a mesh: heads over `tensor`, and over `context` either tokens or, for the time of one call, heads.

`over_mesh` runs a function on each device's share of (b l k m). There the tokens are sharded over `context`;
`exchange` gives the device all tokens of fewer heads instead (the Ulysses way: one all-to-all in, one out).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from mask2dit_jax.axes import Floats
from mask2dit_jax.errors import UserError
from mask2dit_jax.parallel.mesh import BATCH, CONTEXT, TENSOR


def axis_size(axis: str) -> int:
    """Devices along an axis of the current mesh; 1 without a mesh, or if the mesh has no such axis."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def over_mesh(local: Callable, q: Floats["b l k m"], k: Floats["b l k m"], v: Floats["b l k m"]) -> Floats["b l k m"]:
    """`local(q, k, v)` on each device's share: samples over (data, fsdp), tokens over context, heads over tensor.

    Tokens that do not divide over the devices are padded with zeros here; `local` sees shares of one size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q, k, v)
    if q.shape[2] % axis_size(TENSOR):
        raise UserError(f"{q.shape[2]} heads do not divide over mesh.tensor={axis_size(TENSOR)}; use a divisor of them")
    tokens = q.shape[1]
    spec = PartitionSpec(_batch_axes(q.shape[0]), *(axis if axis in mesh.shape else None for axis in (CONTEXT, TENSOR)))
    run = jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return run(*(_pad(x, 1, axis_size(CONTEXT)) for x in (q, k, v)))[:, :tokens]


def exchange(attend: Callable, tokens: int) -> Callable:
    """`attend` of all tokens, as a `local` of `over_mesh`: heads are exchanged for tokens before, and back after.

    Heads that do not divide over `context` are padded; the padding is work for nothing, but correct.
    """
    context = axis_size(CONTEXT)

    def local(q, k, v):
        if context == 1:
            return attend(q, k, v)
        heads = q.shape[2]
        out = attend(*(_tokens_of_fewer_heads(_pad(x, 2, context), context)[:, :tokens] for x in (q, k, v)))
        return _heads_of_fewer_tokens(_pad(out, 1, context), context)[:, :, :heads]

    return local


# What goes to each device is laid out as a whole first, along a leading axis. An exchange along the axis of tokens,
# whose shares are no multiple of a register's rows, costs XLA's TPU compiler a hundred seconds of shuffling code; this,
# three.


def _tokens_of_fewer_heads(x: Floats["b l k m"], context: int) -> Floats["b lc kc m"]:
    parts = rearrange(x, "b l (c k) m -> c b k l m", c=context)
    return rearrange(_exchanged(parts), "c b k l m -> b (c l) k m")


def _heads_of_fewer_tokens(x: Floats["b lc kc m"], context: int) -> Floats["b l k m"]:
    parts = rearrange(x, "b (c l) k m -> c b k l m", c=context)
    return rearrange(_exchanged(parts), "c b k l m -> b l (c k) m")


def _exchanged(parts):
    return jax.lax.all_to_all(parts, CONTEXT, split_axis=0, concat_axis=0, tiled=True)


def _batch_axes(batch: int) -> tuple[str, ...]:
    """Those of the batch axes that the samples divide over; along the others every device computes the same."""
    axes, share = [], batch
    for axis in BATCH:
        if axis_size(axis) > 1 and share % axis_size(axis) == 0:
            axes.append(axis)
            share //= axis_size(axis)
    return tuple(axes)


def _pad(x, axis: int, multiple: int):
    """Zeros at the end of an axis, up to a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
