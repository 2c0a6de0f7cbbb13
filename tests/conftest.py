"""The tests check every jaxtyping signature of the package at run time, and run on the CPU whatever else is there."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

from tests.xla_flags import XLA_FLAGS

os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)  # read when the first device is asked for

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; what asks for none runs on the first
install_import_hook("mask2dit_jax", "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def _own_user_cache(tmp_path_factory):
    """The hashes of files that tests make do not belong in the user's cache."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))
        yield


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
