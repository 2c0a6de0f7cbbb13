"""A model without memory: its graph, and where each parameter will lie."""

from flax import nnx
from jax.sharding import Mesh

from mask2dit_jax.memoryless import memoryless
from mask2dit_jax.parallel import sharding


def abstract_module(kind: type[nnx.Module], config, dtype, mesh: Mesh, table: sharding.Table, param_dtype=None):
    """Graph and parameters (shape, dtype, sharding) of `kind(config)`.

    Args:
        dtype: of the computation.
        param_dtype: of the parameters; that of the computation if not given, as frozen models are kept.
    """
    dtypes = {"dtype": dtype, "param_dtype": param_dtype or dtype}
    graph, params = nnx.split(memoryless(kind, config, **dtypes))
    return graph, sharding.placed(params, sharding.parameter_shardings(params, mesh, table))
