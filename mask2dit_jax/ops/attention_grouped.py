"""Grouped attention (paper, section 3.2 and Fig. 3): a cross-attention a segment instead of a masked self-attention.

Each of the 2n segments attends to the runs of keys its mask allows. The runs are slices, never joined: a query meets
the shared video keys and its own text keys in one softmax over the concatenated *logits*, so no scene makes a copy
of all video keys and values. Queries go in blocks, so that no array is ever S x S, forward or backward.
"""

import functools

import jax
import jax.numpy as jnp

from mask2dit_jax.axes import Floats
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.masks import key_runs

# Queries a block: the logits of one block are (b, k, QUERY_BLOCK, keys). Matrix products are already efficient at this
# size, and at 53,328 keys and 48 heads one block of fp32 logits is 4.9 GiB / 48 a head.
QUERY_BLOCK = 512


def grouped_attention(
    q: Floats["b l k m"], k: Floats["b l k m"], v: Floats["b l k m"], *, mask: str, layout: SceneLayout
) -> Floats["b l k m"]:
    """Equal to dense attention under `mask`; memory is linear in the number of tokens."""
    outputs, slices = [], {}
    for segment in layout.segments:
        runs = [(run.start, run.stop) for run in key_runs(mask, layout, segment)]
        for start, stop in runs:  # each slice is made once, whoever uses it
            slices.setdefault((start, stop), (k[:, start:stop], v[:, start:stop]))
        attend = functools.partial(_attend_runs, tuple(slices[run] for run in runs))
        outputs.append(_in_blocks(attend, q[:, segment.start : segment.stop]))
    return jnp.concatenate(outputs, axis=1)


def _in_blocks(attend, q: Floats["b q k m"]) -> Floats["b q k m"]:
    """Runs `attend` over blocks of queries, one after the other; the backward pass recomputes each block's logits."""
    num_queries = q.shape[1]
    if num_queries <= QUERY_BLOCK:
        return attend(q)
    attend = jax.checkpoint(attend)
    whole = num_queries - num_queries % QUERY_BLOCK
    blocks = q[:, :whole].reshape(q.shape[0], -1, QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1)
    out = jax.lax.map(attend, blocks).swapaxes(0, 1).reshape(q.shape[0], whole, *q.shape[2:])
    if whole == num_queries:
        return out
    return jnp.concatenate([out, attend(q[:, whole:])], axis=1)


def _attend_runs(runs, q: Floats["b q k m"]) -> Floats["b q k m"]:
    """One softmax over several runs of keys; logits and softmax in fp32, as in `jax.nn.dot_product_attention`."""
    scale = q.shape[-1] ** -0.5
    logits = [jnp.einsum("bqkm,blkm->bkql", q, keys, preferred_element_type=jnp.float32) * scale for keys, _ in runs]
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(q.dtype)
    out, start = 0.0, 0
    for _, values in runs:
        stop = start + values.shape[1]
        out += jnp.einsum("bkql,blkm->bqkm", weights[..., start:stop], values, preferred_element_type=jnp.float32)
        start = stop
    return out.astype(q.dtype)
