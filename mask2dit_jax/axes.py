"""The axis legend. Each letter means the same thing in every einsum, einops pattern, comment and type.

    b  batch             f  latent (or pixel) frame       t  text token       k  attention head
    s  scene             h, w  rows, columns              l  token            d  width of the transformer
    c  channel           p  patch side                    m  head dimension   x  width of the text embedding

Latents and pixels have their channels last and their frames in temporal order: `b f h w c`. The scenes of a video
follow each other along `f`. Tokens are ordered `[T_1 .. T_n ; V_1 .. V_n]` along `l` (all texts, then all videos).
Timesteps are `b s`.

`Floats["b f h w c"]` and the other annotations below come from jaxtyping. They cost nothing at run time; the tests
check them.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array


class _Shaped:
    """Shorten `Float[Array, "b l d"]` to `Floats["b l d"]`, so that every signature can carry its axes."""

    def __init__(self, kind, array):
        self._kind, self._array = kind, array

    def __getitem__(self, axes: str):
        return self._kind[self._array, axes]


Floats = _Shaped(Float, Array)
Ints = _Shaped(Int, Array)
NpFloats = _Shaped(Float, np.ndarray)
NpInts = _Shaped(Int, np.ndarray)
NpBools = _Shaped(Bool, np.ndarray)
