"""Compiled programs outlive the process, in the place that is named or else the user's cache."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from mask2dit_jax.caches import keep_compiled_programs
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


def run(**environment: str) -> str:
    environment = {key: value for key, value in os.environ.items() if "CACHE" not in key} | environment
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_programs_are_read_back(tmp_path):
    assert run(XDG_CACHE_HOME=str(tmp_path)) == f"{tmp_path}/mask2dit_jax/compiled True"
    assert any((tmp_path / "mask2dit_jax" / "compiled").iterdir())


def test_the_place_can_be_named(tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "here"), XDG_CACHE_HOME="/nowhere") == f"{tmp_path}/here True"
