"""The axis legend: one letter means one thing in every einsum, einops pattern, comment and type of this package.

    b  batch             f  latent (or pixel) frame       t  text token       k  attention head
    s  scene             h, w  rows, columns              l  token            d  width of the transformer
    c  channel           p  patch side                    m  head dimension   x  width of the text embedding

Latents and pixels are channels-last, frames in time order: `b f h w c`. The scenes of one video follow each other
along `f`. Tokens follow the official order `[T_1 .. T_n ; V_1 .. V_n]` along `l`. Timesteps are `b s`.

`F32["b f h w c"]` and friends below are jaxtyping annotations: free at run time, checked in the tests.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array


class _Shaped:
    """`Floats["b l d"]` instead of `Float[Array, "b l d"]`: short enough for every signature."""

    def __init__(self, kind, array):
        self._kind, self._array = kind, array

    def __getitem__(self, axes: str):
        return self._kind[self._array, axes]


Floats = _Shaped(Float, Array)
Ints = _Shaped(Int, Array)
NpFloats = _Shaped(Float, np.ndarray)
NpInts = _Shaped(Int, np.ndarray)
NpBools = _Shaped(Bool, np.ndarray)
