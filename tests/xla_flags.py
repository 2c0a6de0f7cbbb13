"""How XLA compiles in the tests. Most of their programs run once or twice: optimising them takes longer than it saves.

A module of its own, as processes read it that are not to have the eight devices of conftest.py.
"""

import jax

XLA_FLAGS = "--xla_backend_optimization_level=0"
# The older emitters of fusions take a third less time; a version of XLA that has lost them ends a process that asks.
if jax.__version_info__ < (0, 11):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
