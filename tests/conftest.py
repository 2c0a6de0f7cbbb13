"""The tests check every jaxtyping signature of the package at run time, and run on the CPU whatever else is there."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

from tests.xla_flags import XLA_FLAGS

os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)  # read when the first device is asked for

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; what asks for none runs on the first
install_import_hook("mask2dit_jax", "beartype.beartype")


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
