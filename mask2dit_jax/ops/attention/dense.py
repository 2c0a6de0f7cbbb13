"""Dense attention, one softmax over all pairs of tokens. It is the reference for the other implementations."""

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Floats
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.masks import dense_mask

# Added to a forbidden logit. It is finite, so that no kernel computes inf - inf, and its exponential is exactly 0.
_FORBIDDEN = float(np.finfo(np.float32).min) / 2


def dense_bias(mask: str, layout: SceneLayout) -> Floats["1 1 l l"]:
    """Return the mask as an additive bias for `jax.nn.dot_product_attention`, in fp32."""
    return jnp.where(dense_mask(mask, layout), 0.0, _FORBIDDEN)[None, None].astype(jnp.float32)


def dense_attention(
    q: Floats["b l k m"], k: Floats["b l k m"], v: Floats["b l k m"], *, mask: str, layout: SceneLayout
) -> Floats["b l k m"]:
    """Compute softmax attention over all pairs of tokens with a bias against forbidden pairs, in O(l^2) memory."""
    bias = None if mask == "v5" else dense_bias(mask, layout)
    return jax.nn.dot_product_attention(q, k, v, bias=bias)
