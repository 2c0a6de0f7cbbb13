"""Attention on a mesh, with heads sharded over `tensor` and tokens over `context`.

`over_mesh` runs a function on each device's share of (b l k m), with the tokens sharded over `context`. `exchange`
wraps an attention so that each device computes all tokens of fewer heads instead (Ulysses: one all-to-all before the
call and one after it).
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
    """Return the number of devices along an axis of the current mesh, or 1 if there is no mesh or no such axis."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def over_mesh(local: Callable, q: Floats["b l k m"], k: Floats["b l k m"], v: Floats["b l k m"]) -> Floats["b l k m"]:
    """Run `local(q, k, v)` on each device's share of samples (data, fsdp), tokens (context) and heads (tensor).

    Tokens that do not divide over `context` are padded with zeros, so that all shares have the same size.

    Raises:
        UserError: The heads do not divide over `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q, k, v)
    if q.shape[2] % axis_size(TENSOR):
        raise UserError(f"{q.shape[2]} heads do not divide over mesh.tensor={axis_size(TENSOR)}; choose a divisor")
    tokens = q.shape[1]
    spec = PartitionSpec(_batch_axes(q.shape[0]), *(axis if axis in mesh.shape else None for axis in (CONTEXT, TENSOR)))
    run = jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return run(*(_pad(x, 1, axis_size(CONTEXT)) for x in (q, k, v)))[:, :tokens]


def exchange(attend: Callable, tokens: int) -> Callable:
    """Make a `local` for `over_mesh` from an attention over all tokens, by exchanging heads for tokens around it.

    Heads that do not divide over `context` are padded. The padding costs work, but the result is correct.

    Args:
        attend: Maps q, k and v (b l k m) to the output.
        tokens: Number of tokens before padding.
    """
    context = axis_size(CONTEXT)

    def local(q, k, v):
        if context == 1:
            return attend(q, k, v)
        heads = q.shape[2]
        out = attend(*(_tokens_of_fewer_heads(_pad(x, 2, context), context)[:, :tokens] for x in (q, k, v)))
        return _heads_of_fewer_tokens(_pad(out, 1, context), context)[:, :, :heads]

    return local


# The parts for the devices are laid out along a leading axis before the exchange. If they lay along the token axis,
# whose shares are not multiples of a register's rows, XLA's TPU compiler would take a hundred seconds for the shuffling
# code instead of three.


def _tokens_of_fewer_heads(x: Floats["b l k m"], context: int) -> Floats["b lc kc m"]:
    parts = rearrange(x, "b l (c k) m -> c b k l m", c=context)
    return rearrange(_exchanged(parts), "c b k l m -> b (c l) k m")


def _heads_of_fewer_tokens(x: Floats["b lc kc m"], context: int) -> Floats["b l k m"]:
    parts = rearrange(x, "b (c l) k m -> c b k l m", c=context)
    return rearrange(_exchanged(parts), "c b k l m -> b l (c k) m")


def _exchanged(parts):
    return jax.lax.all_to_all(parts, CONTEXT, split_axis=0, concat_axis=0, tiled=True)


def _batch_axes(batch: int) -> tuple[str, ...]:
    """Return the batch axes over which the samples divide. Along the others, all devices compute the same."""
    axes, share = [], batch
    for axis in BATCH:
        if axis_size(axis) > 1 and share % axis_size(axis) == 0:
            axes.append(axis)
            share //= axis_size(axis)
    return tuple(axes)


def _pad(x, axis: int, multiple: int):
    """Append zeros to an axis up to a multiple of `multiple`."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
