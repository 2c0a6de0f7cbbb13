"""Tests that compiled programs outlive the process, in the folder that was set or in the user's cache."""

import os
import subprocess
import sys

import jax
import pytest

from mask2dit_jax.io.compiled_programs import keep_compiled_programs

PROGRAM = """
import jax, jax.numpy as jnp
from mask2dit_jax.io.compiled_programs import keep_compiled_programs
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
compile = lambda: jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((9, 9)))
compile()
jax.clear_caches()
hits.clear()
compile()
print(jax.config.jax_compilation_cache_dir, len(hits) > 0)
"""


def test_programs_are_read_back(tmp_path):
    environment = {key: value for key, value in os.environ.items() if "CACHE" not in key}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.strip() == f"{tmp_path}/mask2dit_jax/compiled True"
    assert any((tmp_path / "mask2dit_jax" / "compiled").iterdir())


@pytest.fixture
def named_place():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    yield "gs://bucket/compiled"
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_place_that_is_named_stays(named_place):
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == named_place
