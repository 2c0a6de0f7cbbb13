"""The record of a network: its classes and its tables, in one value beside the network itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mask2dit_jax.models.port_rules import Rule
from mask2dit_jax.parallel.abstract import abstract_module, memoryless
from mask2dit_jax.parallel.sharding import Table


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What porting, sharding and running need of a kind of network.

    Attributes:
        class_names: `_class_name` in the config.json files that this class reads, the one that it writes first.
        module: the class; it is built as `module(config, rngs=..., dtype=..., param_dtype=...)`.
        config: class of its config, a frozen dataclass with `from_json` and `to_json`.
        port_table: returns the rules between torch tensors and parameters for a config.
        sharding_table: partition of every parameter.
    """

    class_names: tuple[str, ...]
    module: type[nnx.Module]
    config: type
    port_table: Callable[[Any], tuple[Rule, ...]]
    sharding_table: Table

    def memoryless(self, config, **kwargs) -> nnx.Module:
        """Return the module with a shape in place of every parameter; `kwargs` are the module's."""
        return memoryless(self.module, config, **kwargs)

    def abstract(
        self, config, dtype: DTypeLike, mesh: Mesh, param_dtype: DTypeLike | None = None
    ) -> tuple[nnx.GraphDef, nnx.State]:
        """Return the module's graph and its parameters as shapes, dtypes and shardings.

        Args:
            config: of this class's `config` type.
            dtype: of the computation.
            mesh: where the parameters will lie.
            param_dtype: of the parameters; None means that of the computation, as frozen models are kept.
        """
        return abstract_module(self.module, config, dtype, mesh, self.sharding_table, param_dtype)
