"""Attention through JAX's splash kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`).

The kernel skips blocks of pairs. This module adds three things.

Blocks. `splash_plan` arranges the tokens and determines which blocks the kernel computes.

Masks inside a block. Each key carries the one-hot vector of its segment in extra channels. Each query carries a huge
negative number in the channels of the segments it may not attend to. The product that computes the logits thus also
masks them. A head is 64 wide but the matrix unit 128 (v6e: 256), so the extra channels use lanes that are empty
otherwise, in memory too. A mask computed in the kernel would need more vector operations per pair than the softmax.

Exchange between the chips that share a sequence, in one of two ways:

    ulysses   An all-to-all exchanges heads for tokens, so that each chip has all tokens of heads / context heads. The
              forward pass sends four arrays the size of a chip's queries (q, k, v and the output), and all chips
              compute the same blocks. Used where the heads divide.
    gather    Each chip keeps its queries and gathers all keys and values. This sends context / 2 times as much, and
              each chip pads its share of the queries.

A ring would send as much as `gather`, overlapped with computation. But it has to join the log-sum-exp at every hop,
forward and backward, with one kernel launch per chip. Where the heads divide, ulysses sends context / 2 times less than
either.

Tokamax has a newer splash kernel. Its backward pass is one kernel of 5 matrix products, whereas dq and dkv take 7 here.
But it accumulates the queries' gradient in bf16 through memory (or keeps one fp32 copy per block of keys, 53 at our
size), it lives in a private, experimental module, and its package pins typeguard 2.13 and brings qwix, pydantic and
more. Its other advantage, no mask in full blocks, the extra channels provide everywhere.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from mask2dit_jax.axes import Floats, NpBools, NpFloats
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention.context_parallel import axis_size, exchange, over_mesh
from mask2dit_jax.ops.attention.permute import move
from mask2dit_jax.ops.attention.residuals import RESIDUALS
from mask2dit_jax.ops.attention.splash_plan import LANES, Plan, allowed_segments, make_plan
from mask2dit_jax.parallel.mesh import CONTEXT, TENSOR, platform

Way = Literal["auto", "ulysses", "gather"]

# Its exponential is 0 whatever logit is added to it. A power of two is exact in every precision.
FORBIDDEN = -(2.0**100)
# Keys per product inside a block, which limits the logits in flight to (queries, 512).
COMPUTE_BLOCK = 512

# Matrix products of (queries, keys) size.
FORWARD_PRODUCTS = 2  # logits, values
IDEAL_BACKWARD_PRODUCTS = 4  # gradients of the weights, values, queries and keys
BACKWARD_PRODUCTS = 7  # those four, the logits in both kernels (dq, dkv), and the weights' gradient a second time


def splash_attention(
    q: Floats["b l k m"],
    k: Floats["b l k m"],
    v: Floats["b l k m"],
    *,
    mask: str,
    layout: SceneLayout,
    way: Way = "auto",
) -> Floats["b l k m"]:
    """Compute block-sparse attention under `mask`, sharded over the current mesh. Off a TPU, Pallas interprets it.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: "v1" to "v5".
        layout: Scenes of the l tokens.
        way: Exchange between chips that share a sequence; see `choose_way`.
    """
    context = axis_size(CONTEXT)
    if choose_way(way, q.shape[2], context, axis_size(TENSOR)) == "ulysses":
        plan = make_plan(mask, layout)
        local = exchange(functools.partial(_attend, plan, mask, 0), layout.num_tokens)
    else:
        local = functools.partial(_attend_gathered, make_plan(mask, layout, context), mask)
    return over_mesh(local, q, k, v)


def choose_way(way: Way, heads: int, context: int, tensor: int) -> Way:
    """Resolve "auto" to "ulysses" if the heads of a tensor shard divide over context, and to "gather" otherwise.

    Raises:
        UserError: `way` is "ulysses" and the heads do not divide.
    """
    divides = heads // tensor % context == 0
    if way == "ulysses" and not divides:
        raise UserError(f"{heads // tensor} heads per tensor shard do not divide over mesh.context={context}")
    if way == "auto":
        return "ulysses" if divides else "gather"
    return way


@dataclasses.dataclass(frozen=True)
class SplashWork:
    """Matrix FLOPs of one attention layer on one chip.

    "Executed" counts the busiest chip. "Ideal" is the even share of each chip if no work were wasted.

    Attributes:
        way: Exchange that is used, "ulysses" or "gather".
        forward_executed: FLOPs of all pairs in the visited blocks.
        forward_ideal: FLOPs of the pairs that the mask allows.
        backward_executed: FLOPs of the dq and dkv kernels, which both recompute the logits. A forward pass repeated by
            rematerialisation is not included.
        backward_ideal: FLOPs of the four products of the gradient.
        occupancy: Executed pairs divided by allowed pairs, for all three kernels, which share their blocks.
        mxu_utilisation: Share of the matrix unit that a product can use. In each product the head dimension is the
            depth or the width, and the unit is `mxu` wide. The FLOPs above exclude the idle part.
    """

    way: Way
    forward_executed: float
    forward_ideal: float
    backward_executed: float
    backward_ideal: float
    occupancy: float
    mxu_utilisation: float


def splash_work(
    mask: str,
    layout: SceneLayout,
    *,
    heads: int,
    head_dim: int,
    context: int = 1,
    tensor: int = 1,
    way: Way = "auto",
    batch: float = 1,
    mxu: int = 128,
) -> SplashWork:
    """Count the work of splash attention, because XLA's cost analysis does not see into the kernel.

    Args:
        mask: "v1" to "v5".
        layout: Scenes and tokens of a sample.
        heads: Number of heads of the model.
        head_dim: Channels of a head.
        context: Size of the context axis of the mesh.
        tensor: Size of the tensor axis of the mesh.
        way: Exchange between chips that share a sequence; see `choose_way`.
        batch: Samples on each (data, fsdp) shard.
        mxu: Width of the chip's matrix unit, 128 (v6e: 256).
    """
    way = choose_way(way, heads, context, tensor)
    plan = make_plan(mask, layout) if way == "ulysses" else make_plan(mask, layout, context)
    heads_here = heads / tensor / (context if way == "ulysses" else 1)
    executed, ideal = (batch * heads_here * 2 * head_dim * n for n in (plan.executed_pairs, plan.ideal_pairs))
    return SplashWork(
        way=way,
        forward_executed=FORWARD_PRODUCTS * executed,
        forward_ideal=FORWARD_PRODUCTS * ideal,
        backward_executed=BACKWARD_PRODUCTS * executed,
        backward_ideal=IDEAL_BACKWARD_PRODUCTS * ideal,
        occupancy=plan.occupancy,
        mxu_utilisation=head_dim / (-(-head_dim // mxu) * mxu),
    )


def _attend_gathered(plan: Plan, mask: str, q, k, v):
    """Attend by the `gather` way on one device, given its (b l/context k m) of q, k and v."""
    k, v = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k, v))
    return _attend(plan, mask, jax.lax.axis_index(CONTEXT), q, k, v)


def _attend(plan: Plan, mask: str, shard, q: Floats["b q k m"], k: Floats["b l k m"], v: Floats["b l k m"]):
    """Attend one device's queries, those of `shard` (which may be traced), to all keys."""
    batch, _, heads, head_dim = q.shape
    q, k, v = (rearrange(x, "b l k m -> (b k) l m") for x in (q * head_dim**-0.5, k, v))
    q, k, v = move(q, plan.queries.moves(), shard), move(k, plan.keys.moves()), move(v, plan.keys.moves())
    forbidding, segment = _mask_channels(plan, mask)
    q, k = _with_channels(q, _of_shard(forbidding, shard)), _with_channels(k, segment[0])
    out = move(_kernel(plan, shard)(q, k, v), plan.queries.moves_back(), shard)
    return rearrange(out, "(b k) l m -> b l k m", b=batch, k=heads)


def _mask_channels(plan: Plan, mask: str) -> tuple[NpFloats["shard q c"], NpFloats["1 l c"]]:
    """Return extra channels of queries and keys whose product over c is 0 for allowed pairs, and FORBIDDEN otherwise.

    There is one channel per segment and a last one for padding keys, to which no token may attend. Padding queries
    attend to everything, because any finite result will do: it is dropped.
    """
    forbidden = np.pad(~allowed_segments(mask, plan.keys.layout), ((0, 1), (0, 1)))
    forbidden[:-1, -1] = True
    forbidding = np.where(forbidden, FORBIDDEN, 0.0).astype(np.float32)
    return forbidding[plan.queries.segments()], np.eye(len(forbidden), dtype=np.float32)[plan.keys.segments()]


def _with_channels(x: Floats["h l m"], channels) -> Floats["h l mc"]:
    channels = jnp.asarray(channels, x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(channels, (x.shape[0], *channels.shape))], axis=-1)


def _of_shard(table: np.ndarray, shard):
    """Return table[shard] for a shard that may be traced. It is a constant if all shards have the same entry."""
    return jnp.asarray(table[0] if (table == table[:1]).all() else jnp.asarray(table)[shard])


def _kernel(plan: Plan, shard) -> splash.SplashAttentionKernel:
    """Build the kernel over (heads, tokens, head_dim) for the blocks of a shard, which all heads share."""
    forward = _mask_info(plan.visits, shard)
    backward = _mask_info(plan.visits.swapaxes(1, 2), shard)
    backward = jax.tree.map(lambda x: x.swapaxes(1, 2), backward)
    return splash.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=_block_sizes(plan.queries.block, plan.keys.block),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=RESIDUALS,
        mask_function=None,
        interpret=platform() != "tpu",
    )


def _block_sizes(block_q: int, block_k: int) -> splash.BlockSizes:
    compute = max(size for size in range(LANES, COMPUTE_BLOCK + 1, LANES) if block_k % size == 0)
    return splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=compute,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )


def _mask_info(visits: NpBools["shard row column"], shard) -> MaskInfo:
    """Return the columns that each row visits, in the form the kernel takes.

    All rows have as many entries as the longest. A shorter row repeats its last entry, for which nothing is fetched
    again, and marks the repetitions as not visited.
    """
    counts = visits.sum(axis=-1, keepdims=True)
    visited = np.arange(max(counts.max(), 1)) < counts
    columns = np.argsort(~visits, axis=-1, kind="stable")
    columns = np.take_along_axis(columns, np.minimum(np.arange(visited.shape[-1]), np.maximum(counts - 1, 0)), axis=-1)
    dtype = np.int8 if visits.shape[-1] <= 128 else np.int16  # scalar memory is small
    data_next, block_mask = (_of_shard(x, shard)[None] for x in (columns.astype(dtype), visited.astype(np.int8)))
    return MaskInfo(data_next, None, block_mask, None, None)
