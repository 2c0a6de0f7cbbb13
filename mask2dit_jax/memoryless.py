"""Modules without memory: what a model is made of, before any of it is."""

import jax
from flax import nnx


class _OneKey(nnx.RngStream):
    """Gives the same key each time. Counting them costs most of the time of tracing a constructor, and nobody sees the
    numbers of a module that has none."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def memoryless(kind: type[nnx.Module], config, **kwargs) -> nnx.Module:
    """`kind(config, rngs=..., **kwargs)` with a `ShapeDtypeStruct` for every parameter."""

    def make():
        rngs = nnx.Rngs(0)
        rngs.default = _OneKey(jax.random.key(0), tag="default")
        return kind(config, rngs=rngs, **kwargs)

    return nnx.eval_shape(make)
