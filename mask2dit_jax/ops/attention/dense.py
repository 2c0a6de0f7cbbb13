"""Dense attention: one softmax over all pairs of tokens. The oracle of every other implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Floats
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.masks import dense_mask

# Added to a forbidden logit. Finite, so that no kernel ever sees inf - inf; its exponential is exactly 0.
_FORBIDDEN = float(np.finfo(np.float32).min) / 2


def dense_bias(mask: str, layout: SceneLayout) -> Floats["1 1 l l"]:
    """The mask as an additive bias for `jax.nn.dot_product_attention`."""
    return jnp.where(dense_mask(mask, layout), 0.0, _FORBIDDEN)[None, None].astype(jnp.float32)


def dense_attention(
    q: Floats["b l k m"], k: Floats["b l k m"], v: Floats["b l k m"], *, mask: str, layout: SceneLayout
) -> Floats["b l k m"]:
    """Softmax attention over all pairs of tokens, the forbidden ones biased away. Needs memory S x S."""
    bias = None if mask == "v5" else dense_bias(mask, layout)
    return jax.nn.dot_product_attention(q, k, v, bias=bias)
