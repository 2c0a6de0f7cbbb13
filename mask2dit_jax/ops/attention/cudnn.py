"""Grouped attention through a flash kernel, whose partial results are joined by their log-sum-exp.

One call attends all video queries to all video keys, and one call per scene attends the scene's queries to its text.
Nothing is copied per scene and nothing is masked. If the parts of a query have outputs O_p and log-sum-exps L_p, then
L = log sum exp(L_p) and O = sum exp(L_p - L) O_p.

The backward pass of a flash kernel needs only (O, L) to recompute the weights exp(logits - L) and the term
rowsum(dO O). Given the joined (O, L), it yields the part's share of the joined gradient, so the join itself needs no
backward pass. `jax.nn.dot_product_attention` does not accept (O, L), and it rounds L to bf16. An L of 11 (50,000 equal
keys) would then be off by up to 0.03, and the weight of the text by 3 %. This module therefore calls the two functions
of JAX's private cuDNN module directly.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax.axes import Floats
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention.residuals import RESIDUALS
from mask2dit_jax.ops.masks import key_runs
from mask2dit_jax.parallel.mesh import platform


class Call(NamedTuple):
    """One call of the kernel, in which all `queries` attend to all `keys`."""

    queries: slice
    keys: slice


def joined_attention(
    q: Floats["b l k m"], k: Floats["b l k m"], v: Floats["b l k m"], *, mask: str, layout: SceneLayout
) -> Floats["b l k m"]:
    """Compute attention under `mask` with cuDNN's flash kernel on a GPU; inputs must be 16-bit.

    On other platforms, plain XLA computes each part and holds its logits. This serves the tests of the join.
    """
    return _joined(q, k, v, mask, layout, "cudnn" if platform() == "gpu" else "xla")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _joined(q, k, v, mask, layout, kernel):
    return _forward(q, k, v, mask, layout, kernel)[0]


def _forward(q, k, v, mask, layout, kernel):
    forward, _ = KERNELS[kernel]
    parts = {}
    for call in kernel_calls(mask, layout):
        out, lse = forward(q[:, call.queries], k[:, call.keys], v[:, call.keys])
        for segment in layout.segments:
            if call.queries.start <= segment.start < call.queries.stop:
                here = slice(segment.start - call.queries.start, segment.stop - call.queries.start)
                parts.setdefault(segment, []).append((out[:, here], lse[:, here]))
    joined = [_join(parts[segment]) for segment in layout.segments]
    # The name lets a remat policy save the residuals; otherwise the backward pass would run the kernel again.
    out, lse = (checkpoint_name(jnp.concatenate(x, axis=1), RESIDUALS) for x in zip(*joined, strict=True))
    return out, (q, k, v, out, lse)


def _backward(mask, layout, kernel, residuals, d_out):
    q, k, v, out, lse = residuals
    _, backward = KERNELS[kernel]
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    for queries, keys in kernel_calls(mask, layout):
        of_queries = (x[:, queries] for x in (out, lse, d_out))
        grads = backward(q[:, queries], k[:, keys], v[:, keys], *of_queries)
        dq, dk, dv = (
            total.at[:, where].add(grad.astype(jnp.float32))
            for total, where, grad in zip((dq, dk, dv), (queries, keys, keys), grads, strict=True)
        )
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_joined.defvjp(_forward, _backward)


def kernel_calls(mask: str, layout: SceneLayout) -> tuple[Call, ...]:
    """Return the calls that together cover each allowed pair once. Adjacent segments with the same keys share one."""
    calls = []
    for segment in layout.segments:
        for run in key_runs(mask, layout, segment):
            neighbour = next((i for i, c in enumerate(calls) if c == (slice(c[0].start, segment.start), run)), None)
            if neighbour is None:
                calls.append(Call(slice(segment.start, segment.stop), run))
            else:
                calls[neighbour] = Call(slice(calls[neighbour].queries.start, segment.stop), run)
    return tuple(calls)


def _join(parts):
    """Return the output (b q k m) and log-sum-exp (b q k) of a softmax over the keys of all parts."""
    outs, lses = zip(*parts, strict=True)
    lse = functools.reduce(jnp.logaddexp, lses)
    out = sum(jnp.exp(part - lse)[..., None] * out for out, part in zip(outs, lses, strict=True))
    return out.astype(outs[0].dtype), lse


def _xla_forward(q, k, v):
    """Return the output (b q k m) and the log-sum-exp (b q k) in fp32."""
    logits = _logits(q, k)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None]).astype(v.dtype)
    return jnp.einsum("bkql,blkm->bqkm", weights, v), lse.swapaxes(1, 2)


def _xla_backward(q, k, v, out, lse, d_out):
    scale = q.shape[-1] ** -0.5
    weights = jnp.exp(_logits(q, k) - lse.swapaxes(1, 2)[..., None])
    d_weights = jnp.einsum("bqkm,blkm->bkql", d_out, v, preferred_element_type=jnp.float32)
    product = jnp.einsum("bqkm,bqkm->bkq", d_out, out, preferred_element_type=jnp.float32)
    d_logits = weights * (d_weights - product[..., None]) * scale
    return (
        jnp.einsum("bkql,blkm->bqkm", d_logits, k),
        jnp.einsum("bkql,bqkm->blkm", d_logits, q),
        jnp.einsum("bkql,bqkm->blkm", weights, d_out),
    )


def _logits(q, k) -> Floats["b k q l"]:
    return jnp.einsum("bqkm,blkm->bkql", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _cudnn():
    """Import JAX's cuDNN module only when it is used, because it is private and may move."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _cudnn_forward(q, k, v):
    out, lse = _cudnn().dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, return_residual=True)
    return out, lse.swapaxes(1, 2)


def _cudnn_backward(q, k, v, out, lse, d_out):
    cudnn = _cudnn()
    absent = jnp.zeros(0, q.dtype)  # bias, lengths, offsets, page tables
    residuals = (q, k, v, *[absent] * 7, lse.swapaxes(1, 2), out)
    grads = cudnn._dot_product_attention_bwd_rule(
        q.shape[-1] ** -0.5,
        42,  # dropout seed; there is no dropout
        0.0,
        (False, False),  # bias, and its gradient
        cudnn.MaskType.NO_MASK,
        cudnn.AttentionLayout.BTNH.value,
        None,
        True,
        False,
        residuals,
        d_out.astype(q.dtype),
    )
    return grads[:3]


KERNELS = {"xla": (_xla_forward, _xla_backward), "cudnn": (_cudnn_forward, _cudnn_backward)}
