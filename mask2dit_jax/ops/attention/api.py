"""The entry point to joint text-video attention. All implementations agree up to rounding for every mask."""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from mask2dit_jax.axes import Floats
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention.context_parallel import exchange, over_mesh
from mask2dit_jax.ops.attention.cudnn import joined_attention
from mask2dit_jax.ops.attention.dense import dense_attention
from mask2dit_jax.ops.attention.grouped import grouped_attention
from mask2dit_jax.ops.attention.splash import splash_attention
from mask2dit_jax.parallel.mesh import platform


def _of_all_tokens(attention: Callable) -> Callable:
    """Make an attention without mesh support run on a mesh, on all tokens of each device's share of the heads."""

    def on_mesh(q, k, v, *, mask, layout):
        return over_mesh(exchange(functools.partial(attention, mask=mask, layout=layout), layout.num_tokens), q, k, v)

    return on_mesh


IMPLEMENTATIONS: dict[str, Callable] = {
    "dense": _of_all_tokens(dense_attention),
    "grouped": _of_all_tokens(grouped_attention),
    "cudnn": _of_all_tokens(joined_attention),
    "splash": splash_attention,
}


def best_implementation(dtype) -> str:
    """Return the name of the fastest implementation for `dtype` on the platform the program is compiled for."""
    if platform() == "tpu":
        return "splash"
    if platform() == "gpu" and jnp.dtype(dtype).itemsize == 2:  # cuDNN's flash attention has no fp32
        return "cudnn"
    return "grouped"


def attend(
    q: Floats["b l k m"],
    k: Floats["b l k m"],
    v: Floats["b l k m"],
    *,
    mask: str,
    layout: SceneLayout,
    implementation: str = "auto",
) -> Floats["b l k m"]:
    """Compute scaled dot-product attention of the tokens of `layout` under a mask.

    Under a mesh (`jax.set_mesh`), samples are sharded over (data, fsdp), tokens over context and heads over tensor.

    Args:
        q: Queries, already rotated if the model uses RoPE.
        k: Keys, likewise.
        v: Values.
        mask: "v1" to "v5".
        layout: Scenes of the l tokens.
        implementation: "splash" (TPU), "cudnn" (GPU), "grouped" (the paper's Fig. 3 in plain XLA, without an l x l
            array), "dense" (the reference, with an l x l bias), or "auto", which chooses by the platform the program
            is compiled for. All run everywhere. Off its platform, "splash" is interpreted and "cudnn" holds all logits.

    Raises:
        UserError: There is no such mask or implementation, or the heads do not divide over the mesh.
    """
    if implementation == "auto":
        implementation = best_implementation(q.dtype)
    if implementation not in IMPLEMENTATIONS:
        choices = ", ".join(["auto", *IMPLEMENTATIONS])
        raise UserError(f"attention {implementation!r} does not exist; choose one of {choices}")
    return IMPLEMENTATIONS[implementation](q, k, v, mask=mask, layout=layout)
