"""Attention by JAX's splash kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`), which skips blocks.

Three things are ours. `attention_blocks` lays the tokens out and says which blocks the kernel computes. The mask inside
a block costs nothing: every key carries the one-hot vector of its segment in additional channels, every query minus a
huge number in the channels of the segments it may not attend to, so that forbidden pairs get that logit from the very
product that makes the logits. A head is 64 wide where the matrix unit is 128 (v6e: 256), so these channels ride in
lanes that are empty otherwise, in memory too; a mask computed in the kernel would cost more vector operations a pair
than the softmax. And the exchange between the chips that hold one sequence, one of two ways:

    ulysses   heads are exchanged for tokens by all-to-all: each chip has all tokens of heads / context heads. Moves
              4 of the size of a chip's queries forward, and all chips compute the same blocks: taken where it divides.
    gather    each chip keeps its queries and gathers all keys and values: context / 2 times as much to move, and each
              chip pads its share of the queries.

Not a ring: it moves what `gather` does and would hide it, but needs the log-sum-exp joined at every hop, forward and
backward, in as many kernel launches as chips; where heads divide, ulysses moves context / 2 times less than either.

Why JAX's copy and not tokamax's, which is newer: there the backward pass is one kernel of 5 matrix products where here
dq and dkv take 7, but it sums the queries' gradient in bf16 through memory (or keeps one fp32 copy for each block of
keys: 53 of them at our size); it lies in a private, experimental module; and its package pins typeguard 2.13 and brings
qwix, pydantic and more. Its other gain, no mask in full blocks, the additional channels give us everywhere.
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

# Its exponential is 0 whatever is added to it; a power of two, so that every precision holds it exactly.
FORBIDDEN = -(2.0**100)
# Keys in one product inside a block: keeps the logits in flight to (queries, 512).
COMPUTE_BLOCK = 512

FORWARD_PRODUCTS = 2  # logits; values
IDEAL_BACKWARD_PRODUCTS = 4  # the gradients of the weights, values, queries and keys
BACKWARD_PRODUCTS = 7  # those, the logits in both kernels (dq, dkv), and the gradient of the weights a second time


def splash_attention(
    q: Floats["b l k m"],
    k: Floats["b l k m"],
    v: Floats["b l k m"],
    *,
    mask: str,
    layout: SceneLayout,
    way: Way = "auto",
) -> Floats["b l k m"]:
    """Block-sparse attention under `mask`, sharded as the current mesh says; off a TPU, the kernel is interpreted."""
    context = axis_size(CONTEXT)
    if choose_way(way, q.shape[2], context, axis_size(TENSOR)) == "ulysses":
        plan = make_plan(mask, layout)
        local = exchange(functools.partial(_attend, plan, mask, 0), layout.num_tokens)
    else:
        local = functools.partial(_attend_gathered, make_plan(mask, layout, context), mask)
    return over_mesh(local, q, k, v)


def choose_way(way: Way, heads: int, context: int, tensor: int) -> Way:
    """ "auto" is "ulysses" where the heads of a tensor shard divide over context."""
    divides = heads // tensor % context == 0
    if way == "ulysses" and not divides:
        raise UserError(f"{heads // tensor} heads a tensor shard do not divide over mesh.context={context}")
    if way == "auto":
        return "ulysses" if divides else "gather"
    return way


@dataclasses.dataclass(frozen=True)
class SplashWork:
    """Matrix FLOPs of one attention layer on one chip: the busiest, and the share of each if nothing were wasted.

    Attributes:
        forward_executed: blocks visited times the area of a block.
        forward_ideal: the pairs that the mask allows.
        backward_executed: the dq and dkv kernels, which both recompute the logits. A forward pass that
            rematerialisation repeats is not in it.
        backward_ideal: the four products of the gradient.
        occupancy: pairs executed over pairs allowed; of all three kernels, as they share their blocks.
        mxu_utilisation: the part of the matrix unit that a product can use. A head is 64 wide; in each product it is
            the depth or the width, and the unit is `mxu` wide. FLOPs above do not contain the idle part.
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
    """What splash attention computes, for `batch` samples a chip. XLA's cost analysis does not see into the kernel.

    Args:
        batch: samples on each (data, fsdp) shard.
        mxu: width of the chip's matrix unit: 128, on v6e 256.
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
    """The `gather` way, on one device: (b l/context k m), all three."""
    k, v = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k, v))
    return _attend(plan, mask, jax.lax.axis_index(CONTEXT), q, k, v)


def _attend(plan: Plan, mask: str, shard, q: Floats["b q k m"], k: Floats["b l k m"], v: Floats["b l k m"]):
    """One device's queries (those of `shard`, which may be traced) against all keys."""
    batch, _, heads, head_dim = q.shape
    q, k, v = (rearrange(x, "b l k m -> (b k) l m") for x in (q * head_dim**-0.5, k, v))
    q, k, v = move(q, plan.queries.moves(), shard), move(k, plan.keys.moves()), move(v, plan.keys.moves())
    forbidding, segment = _mask_channels(plan, mask)
    q, k = _with_channels(q, _of_shard(forbidding, shard)), _with_channels(k, segment[0])
    out = move(_kernel(plan, shard)(q, k, v), plan.queries.moves_back(), shard)
    return rearrange(out, "(b k) l m -> b l k m", b=batch, k=heads)


def _mask_channels(plan: Plan, mask: str) -> tuple[NpFloats["shard q c"], NpFloats["1 l c"]]:
    """Their products over c are 0 for allowed pairs, else FORBIDDEN.

    A channel a segment, and a last one for padding keys, which no token may attend to. Padding queries may attend to
    everything: any finite values do, as they are dropped.
    """
    forbidden = np.pad(~allowed_segments(mask, plan.keys.layout), ((0, 1), (0, 1)))
    forbidden[:-1, -1] = True
    forbidding = np.where(forbidden, FORBIDDEN, 0.0).astype(np.float32)
    return forbidding[plan.queries.segments()], np.eye(len(forbidden), dtype=np.float32)[plan.keys.segments()]


def _with_channels(x: Floats["h l m"], channels) -> Floats["h l mc"]:
    channels = jnp.asarray(channels, x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(channels, (x.shape[0], *channels.shape))], axis=-1)


def _of_shard(table: np.ndarray, shard):
    """table[shard], where the shard may be traced; a constant if all shards have the same."""
    return jnp.asarray(table[0] if (table == table[:1]).all() else jnp.asarray(table)[shard])


def _kernel(plan: Plan, shard) -> splash.SplashAttentionKernel:
    """The kernel over (heads, tokens, head_dim) for the blocks of a shard. All heads have the same."""
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
    """The columns that each row visits, in the kernel's form: as many entries a row as the longest has, the rest
    repeating the last (nothing is fetched anew for it) and marked as not visited."""
    counts = visits.sum(axis=-1, keepdims=True)
    visited = np.arange(max(counts.max(), 1)) < counts
    columns = np.argsort(~visits, axis=-1, kind="stable")
    columns = np.take_along_axis(columns, np.minimum(np.arange(visited.shape[-1]), np.maximum(counts - 1, 0)), axis=-1)
    dtype = np.int8 if visits.shape[-1] <= 128 else np.int16  # scalar memory is small
    data_next, block_mask = (_of_shard(x, shard)[None] for x in (columns.astype(dtype), visited.astype(np.int8)))
    return MaskInfo(data_next, None, block_mask, None, None)
