"""Modules without memory: shape, dtype and sharding of every parameter, before any of them exists."""

import jax
from flax import nnx
from jax.sharding import Mesh

from mask2dit_jax.parallel import sharding


class _OneKey(nnx.RngStream):
    """A stream that gives the same key each time.

    Counting keys takes most of the time of tracing a constructor, and an abstract module has no values to differ.
    """

    def __call__(self) -> jax.Array:
        return self.key[...]


def memoryless(kind: type[nnx.Module], config, **kwargs) -> nnx.Module:
    """Build `kind(config, rngs=..., **kwargs)` with a `ShapeDtypeStruct` in place of every parameter."""

    def make():
        rngs = nnx.Rngs(0)
        rngs.default = _OneKey(jax.random.key(0), tag="default")
        return kind(config, rngs=rngs, **kwargs)

    return nnx.eval_shape(make)


def abstract_module(kind: type[nnx.Module], config, dtype, mesh: Mesh, table: sharding.Table, param_dtype=None):
    """Return the graph of `kind(config)` and its parameters as shapes, dtypes and shardings.

    Args:
        kind: class of the module.
        config: its config.
        dtype: of the computation.
        mesh: where the parameters will lie.
        table: partition of every parameter.
        param_dtype: of the parameters; None means that of the computation, as frozen models are kept.
    """
    dtypes = {"dtype": dtype, "param_dtype": param_dtype or dtype}
    graph, params = nnx.split(memoryless(kind, config, **dtypes))
    return graph, sharding.placed(params, sharding.parameter_shardings(params, mesh, table))
