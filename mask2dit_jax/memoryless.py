"""Modules without memory: what a model is made of, before any of it is."""

import jax
from flax import nnx


class _OneKey:
    """Stands in for `nnx.Rngs`, whose counting costs most of the time of tracing a constructor: nobody sees the numbers
    of a module that has none."""

    def __init__(self):
        self._key = jax.random.key(0)

    def params(self):
        return self._key


def memoryless(kind: type[nnx.Module], config, **kwargs) -> nnx.Module:
    """`kind(config, rngs=..., **kwargs)` with a `ShapeDtypeStruct` for every parameter."""
    return nnx.eval_shape(lambda: kind(config, rngs=_OneKey(), **kwargs))
