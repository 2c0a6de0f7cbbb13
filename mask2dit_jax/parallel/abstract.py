"""Modules without memory: the shape, dtype and sharding of every parameter, before any of them exists."""

import jax
from flax import nnx
from jax.sharding import Mesh

from mask2dit_jax.parallel import sharding


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


def abstract_module(kind: type[nnx.Module], config, dtype, mesh: Mesh, table: sharding.Table, param_dtype=None):
    """Graph and parameters (shape, dtype, sharding) of `kind(config)`.

    Args:
        dtype: of the computation.
        param_dtype: of the parameters; that of the computation if not given, as frozen models are kept.
    """
    dtypes = {"dtype": dtype, "param_dtype": param_dtype or dtype}
    graph, params = nnx.split(memoryless(kind, config, **dtypes))
    return graph, sharding.placed(params, sharding.parameter_shardings(params, mesh, table))
