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


def count_in_words(params: nnx.State) -> str:
    """Return how many parameters a state of arrays or shapes holds, such as "5.57 B"."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    unit, name = next((pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if count >= pair[0]), (1, ""))
    return f"{count / unit:.3g} {name}".strip()


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
