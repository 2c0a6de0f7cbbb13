"""Grouped attention (paper, section 3.2 and Fig. 3): a cross-attention per segment instead of masked self-attention.

Each of the 2n segments attends to the runs of keys that the mask allows. The runs remain separate slices. A softmax
over the logits of all runs combines the shared video keys with the scene's text keys, so no scene copies the video keys
and values. Queries are processed in blocks, so that no array is l x l, neither forward nor backward.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax.axes import Floats
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention.residuals import RESIDUALS
from mask2dit_jax.ops.masks import key_runs
from mask2dit_jax.parallel.mesh import platform

# Maximum number of queries in a block. A block has (QUERY_BLOCK, keys) logits per head, 104 MiB in fp32 at 53,328 keys.
# Matrix products are already efficient at this size.
QUERY_BLOCK = 512


def grouped_attention(
    q: Floats["b l k m"], k: Floats["b l k m"], v: Floats["b l k m"], *, mask: str, layout: SceneLayout
) -> Floats["b l k m"]:
    """Compute attention under `mask` in memory linear in the number of tokens."""
    attend = functools.partial(_attend, groups=query_groups(mask, layout))
    heads = tuple(rearrange(x, "b l k m -> (b k) l m") for x in (q, k, v))
    if platform() == "cpu":
        # One head at a time keeps the logits in the caches and avoids batched products. This is a sixth to a third
        # faster at 1254 tokens and 8 heads (docs/speed.md).
        out = jax.lax.map(lambda head: attend(*(x[None] for x in head))[0], heads)
    else:
        out = attend(*heads)
    return checkpoint_name(rearrange(out, "(b k) l m -> b l k m", b=q.shape[0]), RESIDUALS)


def query_groups(mask: str, layout: SceneLayout) -> list[tuple[slice, tuple[slice, ...]]]:
    """Return the runs of queries in token order, each with its runs of keys.

    Adjacent segments that attend to the same keys form one run.
    """
    groups = []
    for segment in layout.segments:
        queries, keys = slice(segment.start, segment.stop), key_runs(mask, layout, segment)
        if groups and groups[-1][1] == keys:
            queries = slice(groups.pop()[0].start, queries.stop)
        groups.append((queries, keys))
    return groups


def _attend(q: Floats["k l m"], k: Floats["k l m"], v: Floats["k l m"], groups) -> Floats["k l m"]:
    outputs = []
    for queries, keys in groups:
        # The backward pass recomputes the logits of each block.
        of_block = jax.checkpoint(functools.partial(_attend_runs, runs=[(k[:, run], v[:, run]) for run in keys]))
        outputs.append(_in_blocks(of_block, q[:, queries]))
    return jnp.concatenate(outputs, axis=1)


def _in_blocks(attend, q: Floats["k q m"]) -> Floats["k q m"]:
    """Run `attend` on one block of queries after another. All blocks have one size; zeros pad the last."""
    queries = q.shape[1]
    count = -(-queries // QUERY_BLOCK)
    if count == 1:
        return attend(q)
    size = -(-queries // count)
    padded = jnp.pad(q, ((0, 0), (0, count * size - queries), (0, 0)))
    out = jax.lax.map(attend, rearrange(padded, "k (n q) m -> n k q m", n=count))
    return rearrange(out, "n k q m -> k (n q) m")[:, :queries]


def _attend_runs(q: Floats["k q m"], runs) -> Floats["k q m"]:
    """Compute one softmax over several runs of keys, in fp32 as in `jax.nn.dot_product_attention`.

    The division by the sum comes last, when a query has m numbers instead of one per key.
    """
    scale = q.shape[-1] ** -0.5
    logits = [jnp.einsum("kqm,klm->kql", q, keys, preferred_element_type=jnp.float32) for keys, _ in runs]
    highest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in jax.lax.stop_gradient(logits)])
    weights = [jnp.exp((x - highest) * scale) for x in logits]
    total = sum(x.sum(axis=-1, keepdims=True) for x in weights)
    out = sum(
        jnp.einsum("kql,klm->kqm", x.astype(q.dtype), values, preferred_element_type=jnp.float32)
        for x, (_, values) in zip(weights, runs, strict=True)
    )
    return (out / total).astype(q.dtype)
