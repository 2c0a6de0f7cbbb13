"""The tests check every jaxtyping signature of the package at run time, and run on the CPU whatever else is there."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# Most of these programs run once or twice: optimising them takes longer than it saves. The older emitters of fusions
# take a third less time than the new ones; a version of XLA that has lost them ends a process that asks for them.
XLA_FLAGS = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)  # read when the first device is asked for

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; what asks for none runs on the first
install_import_hook("mask2dit_jax", "beartype.beartype")


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
