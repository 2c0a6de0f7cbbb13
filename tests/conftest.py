"""The tests check every jaxtyping signature of the package at run time, and run on the CPU whatever else is there."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("mask2dit_jax", "beartype.beartype")
